"""ONNX Runtime sessions, made one way everywhere: threads pinned, spinning stated, quiet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from pqk.core.every_token import with_every_token
from pqk.data.structures import Outputs, restructured
from pqk.errors import InputError
from pqk.target.machine import usable_cores

OnnxSource = Path | str | bytes
"""an ONNX file, or its bytes"""
IDS, MASK, PLACES, PAST, PRESENT = "input_ids", "attention_mask", "position_ids", "past_key_values.", "present."
"""what files that continue texts call their inputs and outputs, in Hugging Face's tools and here"""
LOGITS = "logits"
ENCODED, SOURCE_MASK = "encoder_hidden_states", "encoder_attention_mask"
"""what a decoder's file calls the encoder's hidden states, and the mask of its source"""
HIDDEN = "last_hidden_state"
"""what an encoder's file calls its hidden states"""
DECODER_FILE = "decoder_model_merged.onnx"
"""what Hugging Face's tools call a decoder that takes and gives what is kept, with the first token and with others"""
TARGET = ("decoder_input_ids", "decoder_attention_mask")
"""what a model of two files is given of a target, beside its source"""


def encoder_of(decoder: Path) -> Path:
    """Where the file of the encoder is that belongs to a decoder's: `encoder_model.onnx` for the usual name."""
    return decoder.with_name(f"encoder_{decoder.name.removeprefix('decoder_').replace('_merged', '')}")


def files_of(model: Path) -> tuple[Path, ...]:
    """The files that a deployed model is: its own, and that of its encoder where it is a decoder with one."""
    encoder = encoder_of(model)
    return (model, encoder) if encoder.is_file() else (model,)


def size_of(model: Path) -> int:
    """The bytes of a deployed model, in all its files."""
    return sum(path.stat().st_size for path in files_of(model))


def copy_files(model: Path, to: Path) -> None:
    """Copy a deployed model, in all its files."""
    for source, target in zip(files_of(model), (to, encoder_of(to)), strict=False):
        shutil.copyfile(source, target)


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
    names = [i.name for i in run.get_inputs()]
    if not any(name.startswith(PAST) for name in names):
        return run
    if ENCODED not in names or isinstance(model, bytes) or not (encoder := encoder_of(Path(model))).is_file():
        again = partial(session, threads=threads, spinning=spinning, optimized=optimized)
        return Continuing(run, lambda: again(with_every_token(model)))
    reads = session(encoder, threads=threads, spinning=spinning, optimized=optimized)
    return EncoderDecoderSession(reads, run, (encoder, Path(model)))


class Continuing:
    """A session of a file that continues texts, run as one that does not: what is not given of the past is zeros.

    There are as many past tokens as the mask has beside those that are given, by default none; where the new ones stand
    is counted from the mask. What would be kept for the next tokens is given back by `run` only where it is asked for.
    """

    def __init__(self, run: ort.InferenceSession, widened: Callable[[], ort.InferenceSession]) -> None:
        """`widened` opens the same file with logits of every token, for one that gives those of the last."""
        self.inner, self._widened = run, widened
        self._pasts: dict[tuple[int, int], dict[str, Any]] = {}
        self._whole: Continuing | None = None
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

    @property
    def last_alone(self) -> bool:
        """Whether the logits are those of the last token alone."""
        return any(o.name == LOGITS and o.shape[1] == 1 for o in self.inner.get_outputs())

    @property
    def of_every_token(self) -> Continuing:
        """A session of the same file that gives logits of every token: itself, where it does.

        Raises `InputError` where another tool made a file of the last token's.
        """
        if not self.last_alone:
            return self
        if self._whole is None:
            self._whole = self._widened()
        return self._whole

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
            self._pasts[batch, tokens] = {i.name: np.zeros(shapes[i.name], kind_of(i)) for i in pasts}
        return self._pasts[batch, tokens]


def of_every_token(run: Any) -> Any:
    """The session that judges whole texts: that of the same file with logits of every token, where it has fewer."""
    return run.of_every_token if isinstance(run, Continuing) else run


@dataclass(frozen=True)
class TargetInput:
    """An input that no file has by that name."""

    name: str
    type: str
    shape: list[str]


class EncoderDecoderSession:
    """The sessions of an encoder and a decoder, run as one model of a source and the tokens of its target.

    Where the mask of the target has more tokens than are given, keys and values of the others are zeros, those of the
    source as well: then the decoder runs alone. Otherwise the encoder reads the source, and the decoder begins.
    """

    def __init__(self, encoder: Any, decoder: Any, paths: tuple[Path, Path]) -> None:
        self.encoder, self.decoder, self.paths = encoder, decoder, paths
        self._inputs = [i.name for i in encoder.get_inputs()]
        self._masked = any(i.name == SOURCE_MASK for i in decoder.get_inputs())
        self._pasts = [i for i in decoder.get_inputs() if i.name.startswith(PAST)]
        self._width = next(i.shape[2] for i in decoder.get_inputs() if i.name == ENCODED)
        self._zeros: dict[tuple[int, int, int], dict[str, Any]] = {}

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], *options: Any) -> list[Any]:
        """The outputs of these names, by default all but what is kept."""
        return self.decoder.run(names or self._names, self.feeds_of_decoder(feeds), *options)

    def feeds_of_encoder(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What the encoder is given of the inputs of both."""
        return {name: feeds[name] for name in self._inputs}

    def feeds_of_decoder(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What the decoder is given of the inputs of both; for the first token, after the encoder was run."""
        ids, mask = (feeds[name] for name in TARGET)
        before, batch = mask.shape[1] - ids.shape[1], len(ids)
        own = {IDS: ids, **({SOURCE_MASK: feeds[MASK]} if self._masked else {})}
        if not before:
            hidden = self.encoder.run([HIDDEN], self.feeds_of_encoder(feeds))[0]
            return {**own, ENCODED: hidden, **self._kept(batch, 0, 0)}
        source = feeds[MASK].shape[1] if self._masked else self._length
        return {**own, **self._kept(batch, before, source)}

    def get_inputs(self) -> list[Any]:
        """The encoder's, and ids and mask of the target."""
        return [
            *self.encoder.get_inputs(),
            *(TargetInput(name, "tensor(int64)", ["batch", "target"]) for name in TARGET),
        ]

    def get_outputs(self) -> list[Any]:
        """All but what is kept."""
        return [o for o in self.decoder.get_outputs() if not o.name.startswith(PRESENT)]

    def end_profiling(self) -> str:
        return str(self.decoder.end_profiling())

    @property
    def _names(self) -> list[str]:
        return [o.name for o in self.get_outputs()]

    @property
    def _length(self) -> int:
        """The tokens of every source, where it is one length."""
        length: int = next(o.shape[1] for o in self.encoder.get_outputs() if o.name == HIDDEN)
        return length

    def _kept(self, batch: int, tokens: int, source: int) -> dict[str, Any]:
        """Zeros for keys and values of so many tokens of a target and of its source, and for its hidden states."""
        key = batch, tokens, source
        if key not in self._zeros:
            lengths = {i.name: source if ".encoder." in i.name else tokens for i in self._pasts}
            shapes = {i.name: (batch, i.shape[1], lengths[i.name], i.shape[3]) for i in self._pasts}
            found: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            if source:
                found[ENCODED] = np.zeros((batch, source, self._width), np.float32)
            self._zeros[key] = found
        return self._zeros[key]


def kind_of(port: Any) -> type[np.generic]:
    """The dtype of what a file takes, or gives, of keys and values."""
    kinds: dict[str, type[np.generic]] = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}
    return kinds.get(port.type, np.float32)


class OnnxModel:
    """An ONNX file called like the module it was made from: tensors in, the module's structure of tensors out."""

    def __init__(self, path: Path, like: Outputs, *, optimized: bool = True, threads: int | None = None) -> None:
        """`like` is any output of the module; only its structure is used."""
        self.session = of_every_token(session(path, optimized=optimized, threads=threads or usable_cores()))
        self.names = [i.name for i in self.session.get_inputs()]
        self.like = like

    def __call__(self, *inputs: Tensor) -> Outputs:
        feeds = {name: t.detach().contiguous().numpy() for name, t in zip(self.names, inputs, strict=True)}
        return restructured(self.like, iter(map(torch.from_numpy, self.session.run(None, feeds))))
