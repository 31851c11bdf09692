"""Copies of the user's modules, which a compile changes instead of the modules themselves.

`copy.deepcopy` refuses tensors that a computation with gradients made, which ordinary modules hold: the weight that an
old-style `weight_norm` computes, or an activation of the last forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, remove
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from pqk.errors import InputError, first_line

Module = TypeVar("Module", bound=nn.Module)

OWN = ("_parameters", "_buffers", "_modules")
"""where a module holds what torch knows of"""


def copy_of(module: Module, what: str = "teacher", shared: Iterable[Tensor] = ()) -> Module:
    """A deep copy of `module`, over tensors of its own but for those that are `shared`; the mode is the module's.

    Tensors that are the result of a computation, which `copy.deepcopy` refuses, are copied without their history.
    Weights that hooks of `torch.nn.utils` compute before every call (`weight_norm`, `spectral_norm`, `prune`) are
    parameters of the copy, of the value that they have in eval mode. Raises `InputError`, naming `what` and the
    attribute, where something in it cannot be copied.
    """
    memo: dict[int, object] = {id(t): t.detach().clone() for _, t in _computed(module)}
    memo.update((id(t), t) for t in shared)
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:  # whatever an attribute's own copying raises
        raise InputError(_fault(module, what, error)) from error
    for part in twin.modules():
        _fold_hooks(part)
    return twin


def attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Path and value of every attribute of `module` and its parts that is neither parameter, buffer nor module."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in OWN:
                yield f"{path}.{name}".lstrip("."), value


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Path and value of the tensors in `module` that have a history of gradients."""
    buffers = [(name, b) for name, b in module.named_buffers(remove_duplicate=False)]
    for path, value in (*attributes(module), *buffers):
        for t in _tensors(value, set()):
            if not t.is_leaf:
                yield path, t


def _tensors(value: object, visited: set[int]) -> Iterator[Tensor]:
    """The tensors in `value`, through containers of every kind, which may hold themselves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in visited:
        visited.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, visited)


def _fault(module: nn.Module, what: str, error: Exception) -> str:
    """What cannot be copied, and what to do."""
    for path, value in attributes(module):
        try:
            copy.deepcopy(value, {id(m): m for m in module.modules()} | {id(t): t for _, t in _computed(module)})
        except Exception as own:
            owner, _, name = path.rpartition(".")
            place = f'{what}.get_submodule("{owner}").{name}' if owner else f"{what}.{name}"
            return (
                f"{what}: its attribute {path}, a {type(value).__name__}, cannot be copied ({first_line(own, 200)}); "
                f"take it out before the compile: `del {place}`, or set it to None"
            )
    return f"{what}: {type(module).__name__} cannot be copied, and pqk changes a copy: {first_line(error, 300)}"


def _fold_hooks(module: nn.Module) -> None:
    """Make parameters of the weights that hooks compute before every call."""
    removers: dict[type, Callable[..., object]] = {
        WeightNorm: remove_weight_norm,
        SpectralNorm: remove_spectral_norm,
        BasePruningMethod: lambda module, hook: remove(module, hook),
    }
    for hook in list(module._forward_pre_hooks.values()):
        for kind, removed in removers.items():
            if isinstance(hook, kind):
                removed(module, getattr(hook, "_tensor_name", None) or hook.name)  # type: ignore[attr-defined]
