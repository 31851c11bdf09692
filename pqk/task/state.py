"""What a forward pass writes: counters, which are held still, and state, which no compiled file can keep.

Modules may write to their own buffers and attributes in eval mode, too. A counter of calls is nobody's business, but a
compile makes hundreds of calls, and should leave no trace of them. Where an output depends on what earlier calls wrote,
as on a running mean, there is no one answer to an input, and the file would freeze whatever was written last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pqk.copies import attributes, copy_of
from pqk.data.structures import Inputs, Outputs, tensors
from pqk.errors import InputError, Reason
from pqk.task.borrowed import why_not_its_own
from pqk.task.checks import check_module, try_forward

SAME = 1e-4
"""largest difference of two answers that are the same, as a share of the largest magnitude: how memory lies counts"""


class HeldBuffers:
    """Hooks that give buffers back the values that they had before a call in eval mode; a module's copies have them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.saved: list[dict[str, tuple[Tensor, Tensor]]] = []

    def hold(self, model: nn.Module) -> list[RemovableHandle]:
        """Registers the hooks."""
        return [model.register_forward_pre_hook(self.before), model.register_forward_hook(self.after, always_call=True)]

    def before(self, model: nn.Module, inputs: Any) -> None:
        """Keeps the buffers' values. While a graph is captured nothing is: it has no part of what no output needs."""
        if not torch.compiler.is_exporting():
            held = {} if model.training else {name: model.get_buffer(name) for name in self.names}
            self.saved.append({name: (t, t.clone()) for name, t in held.items()})

    @torch.no_grad()
    def after(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        """Gives them back."""
        if not torch.compiler.is_exporting() and self.saved:
            for name, (buffer, value) in self.saved.pop().items():
                _put(model, name, buffer.copy_(value))


def frozen_copy(model: nn.Module, inputs: Inputs, whose: str = "teacher") -> nn.Module:
    """A copy of a model in eval mode, without gradients, that no call changes. Raises `InputError` as
    `check_module` and `hold_counters` do, and for a module that cannot be copied or run; `whose` it is, "teacher" or
    "student", begins the message."""
    check_module(model, whose)
    twin = copy_of(model, whose).eval().requires_grad_(False)
    hold_counters(twin, inputs, whose)
    if (reason := why_not_its_own(model, twin, inputs, whose)) is not None:
        raise InputError(f"{whose}: {reason}")
    return twin


@contextmanager
def held_counters(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """`hold_counters` for a while."""
    handles = hold_counters(model, inputs)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hold_counters(model: nn.Module, inputs: Inputs, whose: str = "teacher") -> list[RemovableHandle]:
    """Holds still the buffers that a forward pass of `model` writes and no output depends on; else does nothing.

    What is filled once and stays, as a table of positions, is no counter. Everything is given back as it was.

    Raises:
        InputError: an output depends on what earlier calls wrote, and it names where; or the model cannot be run.
    """
    probe = _Probe(model, inputs, whose)
    moving = probe.moving()
    reasons = [why for name in moving if (why := probe.why_not_held(name)) is not None]
    repeated = probe.why_not_repeated()
    probe.restore()
    if reasons or repeated is not None:
        reason = f"its outputs depend on {', '.join(reasons)}, which its forward pass writes" if reasons else repeated
        raise InputError(
            f"{whose}: {reason}: what it answers depends on what it was asked before, and a compiled file keeps no "
            "state. Write to it in training mode only, or take it in and give it back as an input and an output"
        )
    buffers = [name for name in moving if name in probe.buffers]
    return HeldBuffers(buffers).hold(model) if buffers else []


class _Probe:
    """Calls a model and looks at what that changes: parameters, buffers, and attributes that are tensors or numbers."""

    def __init__(self, model: nn.Module, inputs: Inputs, whose: str) -> None:
        self.model, self.inputs, self.whose = model, inputs, whose
        self.other = tuple(t[:1].expand_as(t).contiguous() for t in inputs)
        """the first sample in place of all"""
        self.buffers = {name for name, _ in model.named_buffers()}
        self.start = self._state()
        self.settled = self.start
        """as it is after some calls"""
        self.answers: list[Outputs] = []
        """to the same inputs, twice"""

    def moving(self) -> list[str]:
        """What calls go on changing, given the same inputs or others."""
        self.answers = [self._call(self.inputs)]
        filled = self._state()
        self.answers.append(self._call(self.inputs))
        twice = self._state()
        if not any(_differ(self.start.get(name), value) for state in (filled, twice) for name, value in state.items()):
            return []
        self._call(self.other)
        self.settled = self._state()
        self._call(self.inputs)
        states = (filled, twice, self.settled, self._state())
        return [
            name
            for name in self.settled
            if any(_differ(a.get(name), b.get(name)) for a, b in itertools.pairwise(states))
        ]

    def why_not_repeated(self) -> Reason | None:
        """Why two calls with the same inputs are not the same, though nothing was seen to change, else None."""
        if _alike(*self.answers):
            return None
        return "it gives another answer when it is asked the same again"

    def why_not_held(self, name: str) -> Reason | None:
        """The name of what moves where an output depends on it, else None."""
        self._set(self.settled)
        before = self._call(self.inputs)
        for value in _others(self.settled.get(name)):
            self._set(self.settled)
            _put(self.model, name, value)
            try:
                after = self._call(self.inputs)
            except InputError:  # such as a place in a table that is not there
                return name
            if not _alike(before, after):
                return name
        return None

    def restore(self) -> None:
        """Gives back what moved. What was filled for the first time stays, as after any call."""
        self._set(self.start)

    def _call(self, inputs: Inputs) -> Outputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs = try_forward(self.model, inputs, "example", self.whose)
        return [t.clone() for t in tensors(outputs)]

    def _state(self) -> dict[str, Any]:
        stored = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        kept = {n: v for n, v in attributes(self.model) if isinstance(v, Tensor | int | float) and not _own(n)}
        values = {**{n: t for n, t in stored.items() if not is_lazy(t)}, **kept}
        return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in values.items()}

    @torch.no_grad()
    def _set(self, state: dict[str, Any]) -> None:
        stored = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in state.items():
            present = stored.get(name)
            if present is not None and present.shape == value.shape:
                present.copy_(value)
            else:
                _put(self.model, name, value.clone() if isinstance(value, Tensor) else value)


def _own(name: str) -> bool:
    """Whether an attribute is torch's, of every module."""
    name = name.rpartition(".")[2]
    return name == "training" or name.startswith(("_backward", "_is_full"))


def _put(model: nn.Module, name: str, value: Any) -> None:
    """Sets a buffer or attribute by its path."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if own in owner._buffers:
        owner._buffers[own] = value
    elif own not in owner._parameters:
        setattr(owner, own, value)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return not same or not torch.equal(*(t.nan_to_num() if t.is_floating_point() else t for t in (one, other)))
    return type(one) is not type(other) or one != other


def _alike(one: Outputs, other: Outputs) -> bool:
    """Whether outputs are the same but for rounding."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    for a, b in zip(one, other, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        finite = a[a.isfinite()]
        atol = SAME * float(finite.abs().max()) if finite.numel() else 0.0
        if not torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True):
            return False
    return True


def _others(value: Any) -> Iterator[Any]:
    """Values that a counter, a flag or a mean could have as well."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value + 1_000_003, type(value)(0))
    elif isinstance(value, Tensor) and value.dtype == torch.bool:
        yield ~value
    elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        yield from (value + 1 + value.abs(), torch.zeros_like(value))
    elif isinstance(value, Tensor):
        yield from (value + 1, value + 1_000_003 if value.dtype in (torch.int32, torch.int64) else value + 57)
