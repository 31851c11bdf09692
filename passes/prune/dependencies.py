"""The channel dependencies that torch-pruning finds, in bounded time.

torch-pruning (Fang et al. 2023, arXiv:2301.12900) walks back through autograd's graph. On a construct that it does not
know it raises, or follows indices that never end, and then there is no answer for any layer of the model.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch_pruning
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.data.structures import tensors
from pqk.errors import Reason, first_line
from pqk.passes.prune.channel_group import Member
from pqk.passes.prune.cuts import Dim, channels_of
from pqk.quiet import quiet

T = TypeVar("T")

SECONDS = 10.0
"""of processor time, after which torch-pruning is stopped; networks that it can trace take it up to three"""
_LATE: set[str] = set()
"""networks, by what they are made of, that it did not come back from: it is not asked again as they get narrower"""


@dataclass(frozen=True)
class Dependencies:
    """Layers whose channels torch-pruning would cut together, and bare parameters that pqk cannot cut with them."""

    members: list[Member]
    bare: list[str]


def trace_dependencies(
    model: nn.Module, example: tuple[Tensor, ...], seconds: float = SECONDS
) -> list[Dependencies] | Reason:
    """The groups that torch-pruning finds in `model` (unchanged), or why there is no answer of its to use."""
    kind = _kind_of(model)
    try:
        if kind in _LATE:
            raise TimeoutError
        groups = bounded(lambda: _traced(model, example), seconds)
    except TimeoutError:
        _LATE.add(kind)
        return f"torch-pruning did not come back in {seconds:g} s of processor time"
    except Exception as error:  # a tracer raises anything on a model that it does not know
        return f"torch-pruning cannot trace the model: {first_line(error)}"
    return why_not_consistent(groups) or groups


def _kind_of(model: nn.Module) -> str:
    """What a network is made of, whatever its widths: its layers, and the code that calls them."""
    forwards = (getattr(type(module).forward, "__code__", None) for module in model.modules())
    code = b"".join(each.co_code + repr(each.co_names).encode() for each in forwards if each is not None)
    return hashlib.sha256(re.sub(r"\d+", "", repr(model)).encode() + code).hexdigest()


def _traced(model: nn.Module, example: tuple[Tensor, ...]) -> list[Dependencies]:
    shadow = copy_of(model, "student").eval().requires_grad_(False)
    for path, module in list(shadow.named_modules()):
        if hasattr(module, "trace_as"):
            parent, _, name = path.rpartition(".")
            setattr(shadow.get_submodule(parent), name, module.trace_as())
    # tracing follows autograd, for which one integer input has no gradient and each layer needs one
    shadow.requires_grad_(True)
    graph = torch_pruning.DependencyGraph()
    with quiet(), torch.enable_grad():
        graph.build_dependency(shadow, list(example), lambda m, x: m(*x), output_transform=tensors, verbose=False)
        traced = list(graph.get_all_groups())
    names = {module: path for path, module in shadow.named_modules()}
    return [_members(graph, group, names) for group in traced]


def _members(graph: Any, group: Any, names: dict[nn.Module, str]) -> Dependencies:
    width = graph.get_out_channels(group[0].dep.target.module)
    places: dict[tuple[str, Dim], list[list[int]]] = {}
    bare, parameters = [], []
    for i in range(len(group)):
        item = group[i]
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name.get(module, "")
            if any(name.startswith(f"{path}.") for path in names.values() if path) and item.idxs == item.root_idxs:
                same = tuple((c,) for c in range(width))
                parameters.append(Member(name, "values", module.shape[-1] if module.ndim else 0, same))
            else:
                bare.append(name or "a parameter")
        elif module in names:
            dim: Dim = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            slots = places.setdefault((names[module], dim), [[] for _ in range(width)])
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                slots[root].append(index)
    modules = {path: module for module, path in names.items()}
    members = [
        Member(path, dim, channels_of(modules[path], dim) or 0, tuple(map(tuple, slots)))
        for (path, dim), slots in places.items()
    ]
    return Dependencies(members + parameters, bare)


def why_not_consistent(groups: Sequence[Dependencies]) -> Reason | None:
    """An output channel is of one group; in two it would be cut twice."""
    owners: dict[tuple[str, int], str] = {}
    for group in groups:
        for member in group.members:
            for place in {p for slots in member.places for p in slots} if member.dim == "out" else ():
                owner = owners.setdefault((member.path, place), group.members[0].path)
                if owner != group.members[0].path:
                    return (
                        f'torch-pruning contradicts itself: channel {place} of "{member.path}" is of the group of '
                        f'"{owner}" and of that of "{group.members[0].path}"'
                    )
    return None


class _Stopped(BaseException):
    """Ends the thread that it is raised in; no `except Exception` on the way stops it."""


def bounded(work: Callable[[], T], seconds: float) -> T:
    """The result of `work`, which runs in a thread of its own.

    Raises `TimeoutError`, having ended the thread, after so many seconds of processor time, so that the answer does not
    depend on what else the machine does, and after ten times as many on the clock. What `work` raises, it raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    clocks: list[int] = []

    def run() -> None:
        try:
            if hasattr(time, "pthread_getcpuclockid"):
                clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
            results.append(work())
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=run, daemon=True, name="bounded")
    began = time.monotonic()
    worker.start()
    try:
        while worker.is_alive() and _used(clocks) < seconds and time.monotonic() - began < 10 * seconds:
            worker.join(min(0.5, seconds / 10))
    finally:
        late = worker.is_alive()
        deadline = time.monotonic() + 10
        while worker.is_alive() and time.monotonic() < deadline:  # code may catch it, as a bare `except:` does
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_Stopped))
            worker.join(0.1)
    if late:
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _used(clocks: Sequence[int]) -> float:
    """Processor seconds of the thread with this clock; 0 where the system has none for threads."""
    try:
        return time.clock_gettime(clocks[0]) if clocks else 0.0
    except OSError:  # the thread has ended
        return 0.0
