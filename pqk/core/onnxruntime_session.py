"""ONNX Runtime sessions, made one way everywhere: threads pinned, spinning stated, quiet."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from pqk.data.structures import Outputs, restructured
from pqk.errors import InputError
from pqk.target.machine import usable_cores

OnnxSource = Path | str | bytes
"""an ONNX file, or its bytes"""


def session(
    model: OnnxSource,
    *,
    threads: int = 1,
    spinning: bool = True,
    optimized: bool = True,
    save_to: Path | None = None,
    profile_to: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session with `threads` intra-op threads.

    `optimized=False` disables every graph optimization, which makes the arithmetic that of the ONNX operators, the
    same on every machine. `save_to` writes the graph that will be executed. `profile_to` starts the name of
    the file that `end_profiling` writes. Raises `InputError` for a model that ONNX Runtime refuses.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised, too, and what is less is advice about saving optimized graphs
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        what = "the model's bytes" if isinstance(model, bytes) else str(model)
        raise InputError(f"ONNX Runtime {ort.__version__} refuses {what}: {str(error).strip()}") from error


class OnnxModel:
    """An ONNX file called like the module it was made from: tensors in, the module's structure of tensors out."""

    def __init__(self, path: Path, like: Outputs, *, optimized: bool = True, threads: int | None = None) -> None:
        """`like` is any output of the module; only its structure is used."""
        self.session = session(path, optimized=optimized, threads=threads or usable_cores())
        self.names = [i.name for i in self.session.get_inputs()]
        self.like = like

    def __call__(self, *inputs: Tensor) -> Outputs:
        feeds = {name: t.detach().contiguous().numpy() for name, t in zip(self.names, inputs, strict=True)}
        return restructured(self.like, iter(map(torch.from_numpy, self.session.run(None, feeds))))
