"""ONNX Runtime sessions, made one way everywhere: threads pinned, spinning stated, quiet."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from pqk.errors import InputError

Model = Path | str | bytes
"""an ONNX file, or its bytes"""


def session(
    model: Model, *, threads: int = 1, spinning: bool = True, optimized: bool = True, save_to: Path | None = None
) -> ort.InferenceSession:
    """A CPU session with `threads` intra-op threads.

    `optimized=False` disables every graph optimization, which makes the arithmetic that of the ONNX operators, the
    same on every machine. `save_to` writes the graph that will be executed. Raises `InputError` for a model that
    ONNX Runtime refuses.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # below errors there is only advice about saving optimized graphs
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        what = "the model's bytes" if isinstance(model, bytes) else str(model)
        raise InputError(f"ONNX Runtime {ort.__version__} refuses {what}: {str(error).strip()}") from error
