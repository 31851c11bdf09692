"""What of a model may be pruned, as a table says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pqk.passes.prune.blocks import find_blocks
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.groups import find_groups
from pqk.passes.prune.law import why_not_cut

MAKERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def prunable(
    teacher: nn.Module, sample: Callable[[int], tuple[Tensor, ...]], vocabulary: str | None = None
) -> dict[str, Any]:
    """Of the heads' groups, FFN units, widths of residual streams, and layers: how many may go, of how many; reasons.

    Groups that end in the model's output are nobody's to cut and are left out, and so is that of the layer at the path
    `vocabulary`, whose rows are tokens.
    """
    example = sample(2)
    found: dict[str, list[str | None]] = {kind: [] for kind in ("heads", "units", "width", "layers")}
    for group in find_groups(teacher, example):
        if any(m.path == vocabulary and m.dim == "out" for m in group.members):
            continue
        reason = why_not_cut(teacher, example, group)
        if reason is None or "channels of the model's output" not in reason:
            found[kind_of(group, teacher)].append(reason)
    blocks, declined = find_blocks(teacher, sample(8))
    found["layers"] = [None for _ in blocks] + list(declined.values())
    row: dict[str, Any] = {kind: f"{reasons.count(None)}/{len(reasons)}" for kind, reasons in found.items()}
    said = {kind: list(dict.fromkeys(plain(r) for r in reasons if r is not None)) for kind, reasons in found.items()}
    return row | {"reasons": {kind: reasons for kind, reasons in said.items() if reasons}}


def plain(reason: str) -> str:
    """Without the sizes of errors, which the last digits of a machine's arithmetic are in."""
    return re.sub(r" by [\d.e+-]+ \(largest output [\d.e+-]+\)", "", reason)


def kind_of(group: ChannelGroup, teacher: nn.Module) -> str:
    """Where several layers' outputs are added it is a residual stream; what one layer makes are units."""
    if any(m.dim == "heads" and any(m.places) for m in group.members):
        return "heads"
    makers = [m for m in group.members if m.dim == "out" and isinstance(teacher.get_submodule(m.path), MAKERS)]
    dense = [m for m in makers if getattr(teacher.get_submodule(m.path), "groups", 1) == 1]
    readers = [m for m in group.members if m.dim == "in"]
    return "width" if len(dense) > 1 and len(readers) > 1 else "units"  # what is multiplied has one reader
