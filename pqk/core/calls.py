"""What the modules of a network were given and returned in a forward pass, as it was at that moment.

A tensor that a hook sees is not its value: an operator that works in place, such as the ReLU behind a batch norm of
torchvision's networks, writes over what the hook has kept. Whoever looks at modules' calls looks through `watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from pqk.data.structures import map_tensors, tensors

Copied = Callable[[str], bool]
"""path of a module -> whether its tensors are copied as they come by, which is only needed where they are written to"""


@dataclass(frozen=True)
class Moment:
    """A structure of tensors at one moment of a pass."""

    structure: Any
    """as the network has it, with what was written to it since"""
    versions: tuple[int | None, ...]
    """of its tensors at that moment; None: it keeps no count, as under `torch.inference_mode`"""
    copy: Any = None
    """its values then, where they were copied"""

    @property
    def overwritten(self) -> bool:
        """Whether a tensor of it was written to since, or that cannot be told."""
        now = tuple(version_of(t) for t in tensors(self.structure))
        return now != self.versions or None in now

    @property
    def values(self) -> Any:
        """The structure as it was then. Raises `LookupError` where it was written to and not copied."""
        if not self.overwritten:
            return self.structure
        if self.copy is None:
            raise LookupError("the tensors were written to, and not copied")
        return self.copy


NOTHING = Moment((), ())


@dataclass
class ModuleCall:
    """How one forward pass called a module: how often, and what the call that is kept was given and returned."""

    times: int = 0
    arguments: Moment = NOTHING
    keywords: Moment = field(default_factory=lambda: Moment({}, ()))
    output: Moment = NOTHING


def version_of(t: Tensor) -> int | None:
    """How often `t` was written to; None for a tensor that does not count it."""
    return None if t.is_inference() else t._version


@contextmanager
def watch(
    modules: Mapping[str, nn.Module],
    *,
    copied: Copied = lambda path: True,
    arguments: bool = False,
    kept: Literal["first", "last"] = "last",
) -> Iterator[dict[str, ModuleCall]]:
    """The calls of these modules by path, in the order in which they end; those that are not called are missing.

    `arguments`: keep what the modules are given, too. `kept`: which of a module's calls, where there are several.
    """
    calls: dict[str, ModuleCall] = {}
    given: dict[str, list[tuple[Moment, Moment]]] = {}
    copies: dict[tuple[int, int], Tensor] = {}
    """one for each value, which many modules inside each other are given and return"""

    def copy(t: Tensor) -> Tensor:
        version = version_of(t)
        if version is None:
            return t.clone()
        if (id(t), version) not in copies:
            copies[id(t), version] = t.clone()
        return copies[id(t), version]

    def moment(structure: Any, path: str) -> Moment:
        versions = tuple(version_of(t) for t in tensors(structure))
        return Moment(structure, versions, map_tensors(copy, structure) if copied(path) else None)

    def entering(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.setdefault(path, []).append((moment(args, path), moment(kwargs, path)))

        return hook

    def leaving(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = given[path].pop() if arguments else (NOTHING, NOTHING)
            call = calls.pop(path, ModuleCall())
            call.times += 1
            if call.times == 1 or kept == "last":
                call.arguments, call.keywords = before
                call.output = moment(output, path)
            calls[path] = call

        return hook

    handles = [m.register_forward_hook(leaving(path), with_kwargs=True) for path, m in modules.items()]
    if arguments:
        handles += [m.register_forward_pre_hook(entering(path), with_kwargs=True) for path, m in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
