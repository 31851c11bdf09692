"""Residual blocks that can be left out, and what leaving something out costs on data.

A block is removable when its shortcut alone passes its input through: with its own parameters at zero, on the real
activations that reach it, output equals input (`relu(x + 0) = x` holds where x came from a ReLU). A layer of a
post-norm encoder puts out its input normalized once more, which is the same where the input came out of a norm: there
the scales of norms are set to one and everything else to zero. What else it returns, as attention maps, must be None or
read by nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.calls import ModuleCall, watch
from pqk.data.structures import Inputs, first_tensor, map_tensors, tensors
from pqk.errors import Reason
from pqk.passes.prune.channel_group import matches
from pqk.passes.prune.cuts import Skip
from pqk.task.metrics import distance

NORMALIZED = 1e-3
"""largest difference of values normalized once and twice: what the epsilon of a norm makes"""


@runtime_checkable
class Unremovable(Protocol):
    """A module that says why it is not left out alone, such as a part of a layer that goes whole."""

    why_not_removed: Reason


@dataclass
class _Calls:
    """How one forward pass called a module: how often, and the values of the last call's inputs and output."""

    times: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any

    @classmethod
    def of(cls, call: ModuleCall) -> _Calls:
        """The values of a call, as they were when the module was called and when it returned."""
        return cls(call.times, call.arguments.values, call.keywords.values, call.output.values)


@dataclass(frozen=True)
class Block:
    """A removable block. Those of one signature have the same layers and input shapes: removing them saves the same."""

    path: str
    signature: str
    returns: int = 0
    """length of the tuple that it returns; 0: a tensor"""


def find_blocks(model: nn.Module, inputs: Inputs, protect: Sequence[str] = ()) -> tuple[list[Block], dict[str, str]]:
    """The innermost removable blocks, in order, and why modules of a block's make are not removable.

    `inputs` is a batch of real samples: activations are compared on it.
    """
    candidates = {
        p: m for p, m in model.named_modules() if p and len(list(m.children())) and any(True for _ in m.parameters())
    }
    with torch.no_grad(), watch(candidates, arguments=True) as watched:
        outputs = tensors(model(*inputs))
    calls = {path: _Calls.of(call) for path, call in watched.items()}
    _drop_unread_results(model, inputs, outputs, {candidates[p]: own for p, own in calls.items()})
    reasons: dict[str, str | None] = {p: _why_not_removed(candidates[p], calls[p]) for p in candidates if p in calls}
    passing = [p for p, why in reasons.items() if why is None]
    innermost = _innermost(model, passing)
    kinds = {type(candidates[p]) for p in innermost}
    declined = {p: why for p, why in reasons.items() if why is not None and type(candidates[p]) in kinds}
    if not innermost:  # where nothing can go, the members of lists are what one would expect to
        listed = {p for p in reasons if isinstance(model.get_submodule(p.rpartition(".")[0]), nn.ModuleList)}
        declined = {p: why for p, why in reasons.items() if why is not None and p in listed}
    for block in list(innermost):
        pattern = matches(block, protect)
        if pattern is not None:
            innermost.remove(block)
            declined[block] = f'kept by protect = "{pattern}"'
    return [Block(p, _signature(candidates[p], calls[p]), _returns(calls[p].output)) for p in innermost], declined


def _drop_unread_results(
    model: nn.Module, inputs: Inputs, outputs: list[Tensor], calls: dict[nn.Module, _Calls]
) -> None:
    """Note None for what a module returns beside its first tensor, where the model's outputs do not need it."""
    for module, own in calls.items():
        x, _ = _hidden(own)
        output = own.output
        if own.times != 1 or not isinstance(output, tuple) or not any(isinstance(t, Tensor) for t in output[1:]):
            continue
        if not isinstance(x, Tensor) or not isinstance(output[0], Tensor) or output[0].shape != x.shape:
            continue
        handle = module.register_forward_hook(lambda m, args, out: (out[0], *[None] * (len(out) - 1)))
        try:
            with torch.no_grad():
                without = tensors(model(*inputs))
            if all(torch.equal(one, other) for one, other in zip(without, outputs, strict=True)):
                own.output = (output[0], *[None] * (len(output) - 1))
        except Exception:  # whatever a model raises that misses a result: then it reads it
            continue
        finally:
            handle.remove()


def _innermost(model: nn.Module, passing: list[str]) -> list[str]:
    """The passing modules that hold no other; of an encoder's layer and its parts, the layer: what is in a list."""

    def innermost(paths: list[str]) -> list[str]:
        return [p for p in paths if not any(q.startswith(f"{p}.") for q in paths)]

    lists = (nn.Sequential, nn.ModuleList)
    listed = innermost([p for p in passing if isinstance(model.get_submodule(p.rpartition(".")[0]), lists)])
    parts = [p for p in passing if any(p.startswith(f"{q}.") for q in listed)]
    rest = innermost([p for p in passing if p not in parts])
    return [p for p in passing if p in listed or (p in rest and not any(q.startswith(f"{p}.") for q in listed))]


def _returns(output: Any) -> int:
    return len(output) if isinstance(output, tuple) else 0


def _signature(module: nn.Module, calls: _Calls) -> str:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return hashlib.sha256(f"{module!r}{shapes}{_hidden(calls)[0].shape[1:]}".encode()).hexdigest()[:16]


def _hidden(calls: _Calls) -> tuple[Any, Any]:
    """The first input of a block, however it was passed, and its output or the tensor that heads the tuple of it."""
    inputs = (*calls.arguments, *calls.keywords.values())
    output = calls.output
    one_tensor = isinstance(output, tuple) and len(output) > 0 and all(part is None for part in output[1:])
    return (inputs[0] if inputs else None), (output[0] if one_tensor else output)


def _why_not_removed(module: nn.Module, calls: _Calls) -> Reason | None:
    if isinstance(module, Unremovable):
        return module.why_not_removed
    if calls.times != 1:
        return f"it is called {calls.times} times in one forward pass"
    x, y = _hidden(calls)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "it does not take and return one tensor"
    if not calls.arguments:
        return f"its input is passed by name, as {next(iter(calls.keywords))}"
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"it changes its input from {[*x.shape[1:]]} to {[*y.shape[1:]]}"
    for norm_scale in (0.0, 1.0):
        arguments, keywords = map_tensors(torch.clone, (calls.arguments, calls.keywords))  # it may write to them
        out = first_tensor(_zeroed(module, norm_scale)(*arguments, **keywords))
        if torch.equal(out, x) or (norm_scale and torch.allclose(out, _normalized(module, x), atol=NORMALIZED)):
            return None
    return "its input does not pass through it when its own parameters are zero"


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    eps = next((m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _zeroed(module: nn.Module, norm_scale: float) -> nn.Module:
    """A copy whose parameters are zero, but for the scales of norms: layers of a scale and an offset."""
    zeroed = copy_of(module, "student").eval()
    with torch.no_grad():
        for parameter in zeroed.parameters():
            parameter.zero_()
        for layer in zeroed.modules():
            own = dict(layer.named_parameters())
            vectors = {*own} == {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
            if "weight" in own and (vectors or isinstance(layer, nn.LayerNorm)):
                own["weight"].fill_(norm_scale)
        for name, buffer in zeroed.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
    return zeroed.requires_grad_(False)


@contextmanager
def without_block(model: nn.Module, block: str, returns: int = 0) -> Iterator[nn.Module]:
    """`model` with a block replaced by its shortcut (see `Skip`) within the context."""
    parent, _, name = block.rpartition(".")
    holder, module = model.get_submodule(parent), model.get_submodule(block)
    setattr(holder, name, Skip(returns, module))
    try:
        yield model
    finally:
        setattr(holder, name, module)


@dataclass(frozen=True)
class Edit:
    """A possible removal: how to try it on a model, and which layers it touches."""

    name: str
    trial: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    touches: tuple[str, ...]


@torch.no_grad()
def edit_costs(
    model: nn.Module,
    inputs: Inputs,
    teacher: Any,
    edits: Sequence[Edit],
    blocks: Sequence[str],
    distance: Callable[[Any, Any], float] = distance,
) -> list[float]:
    """The distance from the teacher's outputs that each edit alone leads to.

    Everything that runs before an edit's first layer is computed once, for all edits: those modules return what they
    returned then.
    """
    units = dict(_units(model, "", set(blocks)))
    with watch(units, copied=lambda path: False) as calls:
        model(*inputs)
    order = {path: i for i, path in enumerate(calls)}
    # What is written to after it was returned would be written to in every trial, and is not kept for them.
    stable = [p for p, c in calls.items() if c.times == 1 and c.output.versions and not c.output.overwritten]
    unit_of = {path: unit for unit in units for path, _ in model.get_submodule(unit).named_modules(prefix=unit)}
    costs = []
    for edit in edits:
        first = min((order.get(unit_of[path], 0) for path in edit.touches if path in unit_of), default=0)
        with ExitStack() as stack:
            for path in stable:
                if order[path] < first:
                    stack.enter_context(_returning(units[path], calls[path].output.values))
            stack.enter_context(edit.trial(model))
            costs.append(distance(model(*inputs), teacher))
    return costs


def _units(module: nn.Module, path: str, blocks: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Blocks, and the largest modules around them that hold none."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if any(b.startswith(f"{inner}.") for b in blocks):
            yield from _units(child, inner, blocks)
        else:
            yield inner, child


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Lets `module` return `output`, whatever its inputs."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
