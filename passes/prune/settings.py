"""Settings of pruning: the fields that `prune` and the joint search share, and those of `prune` alone."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from pqk.errors import InputError
from pqk.passes.prune.budget import UNITS
from pqk.passes.prune.channel_group import ChannelGroup, Member
from pqk.passes.prune.cuts import channels_of
from pqk.passes.prune.importance import Importance, WidthScope
from pqk.passes.prune.low_rank import original_layer
from pqk.settings import settings


@settings
class WidthSettings:
    """The budget of a pruning, and how channels compete for it."""

    macs_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's multiply-accumulates over the student's"""
    parameters_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's parameters over the student's"""
    size_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 bytes over the bytes of the student's INT8 form"""
    latency_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 latency over that of the student's INT8 form, both in the target's runtime"""
    importance: Importance = "magnitude"
    """what a channel is worth: weight norm, first-order effect on the task loss, the norm of what it adds to the layers
    that read it (activation), or batch-norm scale"""
    scope: WidthScope = "global"
    """channels compete across the network, or every layer loses the same share, to one narrowing; or (uniform) layers
    that are alike stay so: as many heads and units in each, as Hugging Face's configurations say it of all at once"""
    multiple: int | None = Field(default=None, ge=1)
    """widths are multiples of this; by default what the target's kernels like"""
    floor: float = Field(default=0.25, gt=0)
    """what every layer keeps at least: a share of the channels before any cut if below 1, else a number of channels"""
    ignore: tuple[str, ...] = ()
    """layers, or modules around them, that are never cut (shell patterns: `layer1.*`, `conv1`)"""

    def minimum(self, uncut: nn.Module, group: ChannelGroup) -> int:
        """The fewest channels that a group keeps."""
        return self._least(uncut, group.members[0], group.channels)

    def minimums(self, uncut: nn.Module, group: ChannelGroup) -> list[int]:
        """The fewest channels of a group that each of its members keeps, among those that the member has."""
        present = [sum(map(bool, m.places)) for m in group.members]
        return [
            max(1, min(own, self._least(uncut, m, own) if m.dim == "out" else 0))
            for m, own in zip(group.members, present, strict=True)
        ]

    def _least(self, uncut: nn.Module, member: Member, channels: int) -> int:
        """How many of `channels` of a layer stay: as large a share of them as of all that there were before any cut."""
        if self.floor >= 1:
            return int(self.floor)
        before = original_layer(uncut, member.path)  # none for the channels between the halves of a split layer
        widest = (None if before is None else channels_of(before, "out")) or member.of
        return math.ceil(self.floor * (widest * channels // member.of))


@settings
class PruneSettings(WidthSettings):
    """The fields of `prune`."""

    width: bool = True
    """cut channels"""
    depth: bool = False
    """remove whole residual blocks"""
    blocks: Literal["ranked", "every_other"] = "ranked"
    """which blocks go first: those whose removal costs least on validation data, or every other one of each container,
    then every other one of those that are left, the first staying to the end (as DistilBERT was started)"""
    allocation: Literal["greedy", "table"] = "greedy"
    """how cuts are chosen: one after the other, or all at once: what each width of each group and each block costs on
    data, and what each layer spends with fewer channels, is found once, and of all that is small enough by that the
    cheapest is taken. For a latency budget layers are looked up in a table of this machine, measured once"""
    protect: tuple[str, ...] = ()
    """blocks that are never removed (shell patterns)"""
    keep_blocks: dict[str, int] = Field(default_factory=dict)
    """the fewest children that a container keeps, by its path: `{ layer3 = 5 }`. What a block costs on data before
    recovery says little about how much the student can learn again; late blocks hold most of the parameters"""
    timed: str = ""
    """what the latency budget is of: by default the example, or its last token where the model continues texts; else
    the inputs that the task has under such a name (`Task(timed=…)`; shell pattern), as "a prompt *": the time until the
    first token"""
    best_effort: bool = False
    """where the budget cannot be met, go as far as is allowed instead of failing; the report says how far"""
    steps: int = Field(default=1, ge=1)
    """the budget is approached in this many equal factors, with recovery after each"""
    recovery_epochs: float = Field(default=0.0, ge=0)
    """training after each step, in epochs"""
    recovery_rate: float = Field(default=0.01, gt=0)
    """peak learning rate of that training"""
    batch_norm_batches: int = Field(default=0, ge=0)
    """training batches on which the statistics of batch norms are estimated again after every step's cuts, before
    anything trains; 0: they stay those of the network before the cuts"""
    samples: int = Field(default=256, ge=2)
    """validation samples that blocks are ranked on, and that taylor and activation importance are measured on"""
    removals_per_ranking: int = Field(default=1, ge=1)
    """with depth: how many blocks (and narrowings) go before the rest is ranked again; more is faster and coarser"""
    candidates: int = Field(default=8, ge=1)
    """networks timed along the schedule of narrowings, for a latency budget"""

    @model_validator(mode="after")
    def _consistent(self) -> PruneSettings:
        budgets = [f"{kind}_ratio" for kind in UNITS if getattr(self, f"{kind}_ratio") is not None]
        if len(budgets) != 1:
            raise InputError(
                f"prune: exactly one of {', '.join(f'{k}_ratio' for k in UNITS)} is the budget; "
                f"{' and '.join(budgets) + ' are' if budgets else 'none is'} given"
            )
        if not (self.width or self.depth):
            raise InputError("prune: width and depth are both false, so nothing could be cut; set one of them")
        if self.scope == "uniform" and self.width and (self.depth or self.allocation == "table"):
            raise InputError(
                'prune: scope = "uniform" narrows all layers at once, and depth = true or allocation = "table" one '
                "after the other; remove blocks in a prune of its own, with width = false"
            )
        if self.blocks == "every_other" and (self.width or not self.depth):
            raise InputError(
                'prune: blocks = "every_other" has no costs that narrowings could be compared with; set depth = true '
                "and width = false, and narrow in a prune of its own"
            )
        if self.blocks == "every_other" and self.allocation == "table":
            raise InputError(
                'prune: blocks = "every_other" goes by places, and allocation = "table" by what blocks cost; set one'
            )
        if self.timed and (self.latency_ratio is None or self.allocation == "table"):
            raise InputError(
                "prune: timed says what a latency is of: with latency_ratio as the budget, and not with allocation = "
                '"table", whose layers are looked up for the example'
            )
        if self.floor > 1 and self.floor != int(self.floor):
            raise InputError(f"prune: floor = {self.floor} is neither a share below 1 nor a whole number of channels")
        return self
