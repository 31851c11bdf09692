"""Whether a copy of a module is one: a `forward` that is a closure computes with the module that it was made beside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pqk.data.structures import Inputs, tensors
from pqk.errors import Reason
from pqk.task.checks import try_forward


def why_not_its_own(model: nn.Module, twin: nn.Module, inputs: Inputs, whose: str = "teacher") -> Reason | None:
    """Why `twin`, a copy of `model`, computes with tensors that are not its own; None where it does not."""
    originals = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    own = {id(t) for t in (*twin.parameters(), *twin.buffers())}
    seen = _Seen()
    with seen:
        try_forward(twin, inputs, "example", whose)
    name = next((originals[i] for i in seen.tensors if i in originals), None)
    if name is not None:
        return (
            f"a copy of it computes with {name} of the module that was passed, so that nothing could be trained or "
            "cut: its forward, or a hook, is a function that holds that module (model.forward = lambda x: …, a "
            "closure, a partial). Make it a method of a class, or pass the module without it"
        )
    strange = next((t for i, t in seen.tensors.items() if isinstance(t, nn.Parameter) and i not in own), None)
    if strange is not None:
        return (
            f"it computes with a parameter of shape {list(strange.shape)} that is none of its own: of a module in a "
            "plain list or dict, a global, or a variable around the class. torch does not see it, so that it would "
            "be neither trained, cut nor saved: keep it as an attribute, in nn.ModuleList or in nn.ModuleDict"
        )
    return None


class _Seen(TorchDispatchMode):
    """Notes the tensors that operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.tensors.update((id(t), t) for t in tensors([*args, *kwargs.values()]))
        return func(*args, **kwargs)
