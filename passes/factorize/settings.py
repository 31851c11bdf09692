"""Settings of `factorize`."""

from __future__ import annotations

from pydantic import Field, model_validator

from pqk.errors import InputError
from pqk.passes.prune.budget import UNITS
from pqk.settings import settings


@settings
class FactorizeSettings:
    """The fields of `factorize`."""

    macs_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's multiply-accumulates over the student's"""
    parameters_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's parameters over the student's"""
    size_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 bytes over the bytes of the student's INT8 form"""
    latency_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 latency over that of the student's INT8 form, both in the target's runtime"""
    max_divergence: float | None = Field(default=None, gt=0)
    """how much further from the teacher's answers splitting may take the student's on validation data: mean KL in nats
    for class logits, else mean squared error. Without a budget, as much is split as this allows, by what it saves in
    measured latency where this machine is the target, else in MACs"""
    best_effort: bool = False
    """where the budget cannot be met, go as far as is allowed instead of failing; the report says how far"""
    layers: tuple[str, ...] = ("*",)
    """layers, or modules around them, that may be split (shell patterns: `encoder.*`, `fc1`)"""
    ranks: tuple[float, ...] = Field(default=(0.75, 0.5, 0.25), min_length=1)
    """the ranks that are tried for each layer, as shares of the rank at which both halves together multiply as often as
    the layer does"""
    multiple: int | None = Field(default=None, ge=1)
    """ranks are multiples of this; by default what the target's kernels like"""
    samples: int = Field(default=512, ge=2)
    """validation samples that the halves are made for"""
    ranking_samples: int = Field(default=128, ge=2)
    """validation samples that the cost of each split is measured on"""

    @model_validator(mode="after")
    def _consistent(self) -> FactorizeSettings:
        budgets = [f"{kind}_ratio" for kind in UNITS if getattr(self, f"{kind}_ratio") is not None]
        if len(budgets) > 1:
            raise InputError(f"factorize: one budget at most; {' and '.join(budgets)} are given")
        if not budgets and self.max_divergence is None:
            raise InputError(
                f"factorize: nothing says how much to split; give one of {', '.join(f'{k}_ratio' for k in UNITS)}, or "
                "max_divergence"
            )
        if wrong := [share for share in self.ranks if not 0 < share < 1]:
            raise InputError(
                f"factorize: ranks = {wrong[0]:.4g} is no share between 0 and 1: at 1 both halves multiply as often as "
                "the whole layer does"
            )
        if not self.layers:
            raise InputError('factorize: layers names none, so nothing could be split; leave it out, or take "*"')
        return self
