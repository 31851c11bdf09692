"""Modules that train in one form and are deployed in another: such a module says itself what it is for inference.

Branches that sum to one convolution (RepVGG, Ding et al. 2021, arXiv:2101.03697; ACNet, Ding et al. 2019,
arXiv:1908.03930) help training and cost time afterwards. A module with a method `for_inference() -> nn.Module` is
replaced by what that returns before it is traced, if that gives the same outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pqk.core.modes import fused_layers
from pqk.core.program import Example
from pqk.data.structures import tensors
from pqk.errors import InputError

SAME = 1e-3
"""largest difference of the outputs, as a share of the largest output: weights that are summed up round otherwise"""


def take_deployed_forms(student: nn.Module, example: Example) -> nn.Module:
    """`student` (changed, in eval mode) with every part that offers `for_inference` replaced by what that returns.

    A rewrite: `capture` calls it, and a plan may have it before. Raises `InputError` where that is no module, or the
    student then answers otherwise.
    """
    offers = offers_of(student)
    if not offers:
        return student
    with torch.no_grad(), fused_layers(False):
        before = [t.clone() for t in tensors(student(*example))]
    replaced: list[str] = []
    for path, module in offers.items():
        if any(path.startswith(f"{outer}." if outer else "") for outer in replaced):
            continue  # gone with the module around it
        offer: Any = module.for_inference
        form = offer()
        if not isinstance(form, nn.Module):
            raise InputError(f"capture: for_inference of {path or 'the student'} gave a {type(form).__name__}")
        form.eval()
        replaced.append(path)
        if not path:
            student = form
            break
        parent, _, name = path.rpartition(".")
        setattr(student.get_submodule(parent), name, form)
    with torch.no_grad(), fused_layers(False):
        after = tensors(student(*example))
    for want, got in zip(before, after, strict=True):
        allowed = SAME * max(1e-6, float(want.abs().max())) if want.is_floating_point() else 0.0
        if want.shape != got.shape or not torch.allclose(got, want, rtol=0, atol=allowed, equal_nan=True):
            raise InputError(
                f"capture: with for_inference of {', '.join(path or 'the student' for path in replaced)} the outputs "
                "on the example are other ones; it must give a module that computes the same in eval mode"
            )
    return student


def offers_of(student: nn.Module) -> dict[str, nn.Module]:
    """The parts that are deployed in another form than they train in, by path, the outer ones first."""
    return {path: m for path, m in student.named_modules() if callable(getattr(m, "for_inference", None))}
