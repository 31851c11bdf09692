"""ONNX Runtime sessions, made one way everywhere: threads pinned, spinning stated, quiet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from pqk.data.structures import Outputs, restructured
from pqk.errors import InputError
from pqk.target.machine import usable_cores

OnnxSource = Path | str | bytes
"""an ONNX file, or its bytes"""
IDS, MASK, PLACES, PAST, PRESENT = "input_ids", "attention_mask", "position_ids", "past_key_values.", "present."
"""what files that continue texts call their inputs and outputs, in Hugging Face's tools and here"""


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
        run = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        what = "the model's bytes" if isinstance(model, bytes) else str(model)
        raise InputError(f"ONNX Runtime {ort.__version__} refuses {what}: {str(error).strip()}") from error
    return Continuing(run) if any(i.name.startswith(PAST) for i in run.get_inputs()) else run


class Continuing:
    """A session of a file that continues texts, run as one that does not: what is not given of the past is zeros.

    There are as many past tokens as the mask has beside those that are given, by default none; where the new ones stand
    is counted from the mask. What would be kept for the next tokens is given back by `run` only where it is asked for.
    """

    def __init__(self, run: ort.InferenceSession) -> None:
        self.inner = run
        self._pasts: dict[tuple[int, int], dict[str, Any]] = {}
        self._placed = any(i.name == PLACES for i in run.get_inputs())

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], *options: Any) -> list[Any]:
        """The outputs of these names, by default all but what is kept."""
        if any(name.startswith(PAST) for name in feeds):
            return self.inner.run(names, feeds, *options)
        (batch, new), mask = feeds[IDS].shape, feeds[MASK]
        more = self._past(batch, mask.shape[1] - new)
        if self._placed:
            more = {**more, PLACES: np.maximum(mask.cumsum(1) - 1, 0)[:, -new:]}
        return self.inner.run(names or self._names, {**more, **feeds}, *options)

    def get_inputs(self) -> list[Any]:
        """All but the past, and the places of the new tokens."""
        return [i for i in self.inner.get_inputs() if not i.name.startswith(PAST) and i.name != PLACES]

    def get_outputs(self) -> list[Any]:
        """All but what is kept."""
        return [o for o in self.inner.get_outputs() if not o.name.startswith(PRESENT)]

    def end_profiling(self) -> str:
        return self.inner.end_profiling()

    @property
    def _names(self) -> list[str]:
        return [o.name for o in self.get_outputs()]

    def _past(self, batch: int, tokens: int) -> dict[str, Any]:
        if (batch, tokens) not in self._pasts:
            pasts = [i for i in self.inner.get_inputs() if i.name.startswith(PAST)]
            shapes = {i.name: (batch, i.shape[1], tokens, i.shape[3]) for i in pasts}
            kinds = {i.name: np.uint8 if "uint8" in i.type else np.float32 for i in pasts}
            self._pasts[batch, tokens] = {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()}
        return self._pasts[batch, tokens]


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
