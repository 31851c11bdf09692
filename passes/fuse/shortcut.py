"""A shortcut without weights as the launch that adds it reads it: every second pixel, channels moved, zeros elsewhere.

ResNets shorten a stage's shortcut by slices and a pad (option A of He et al. 2015, arXiv:1512.03385, section 3.3), or,
where channels were cut unevenly, by a pad and a gather. On integers these only move values, so no launch needs to write
what they give: the convolution that adds the shortcut reads the right pixel and channel of what came before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pqk.core.aten import PADS, SHORTCUTS, aten
from pqk.core.graph import arguments, attribute, operand, shape


@dataclass(frozen=True)
class Shortcut:
    """Output (y, x, o) is pixel (y, x) * `stride` of `source` (NCHW integers), channel `channels[o]`; 0 where -1."""

    source: fx.Node
    channels: Tensor
    stride: int


def shortcut(root: fx.GraphModule, node: fx.Node, zero_point: int) -> Shortcut | None:
    """`node`, integers of an image, as a shortcut; None where it is none, or moves in ways that this is not."""
    moves: list[fx.Node] = []
    while node.target in SHORTCUTS:
        moves.insert(0, node)
        node = operand(node)
    if not moves or len(shape(node)) != 4:
        return None
    channels = torch.arange(shape(node)[1] or 0, dtype=torch.int32)
    strides = {2: 1, 3: 1}
    for move in moves:
        a = arguments(move)
        axis = a["dim"] % 4 if "dim" in a else 1
        if move.target in PADS:
            before, after = [*a["pad"], *[0] * 6][4:6]
            if any(a["pad"][:4]) or any(a["pad"][6:]) or min(before, after) < 0:
                return None
            if (before or after) and (zero_point or a["value"]):
                return None  # the launch's 0 is not this padding's
            channels = torch.nn.functional.pad(channels, (before, after), value=-1)
        elif move.target is aten.index_select.default:
            if axis != 1 or a["index"].op != "get_attr":
                return None
            channels = channels[attribute(root, str(a["index"].target)).long()]
        elif axis == 1:
            channels = channels[a["start"] : a["end"] : a["step"]]
        elif axis in strides and not a["start"] and (a["end"] or 0) >= (shape(operand(move))[axis] or 1 << 62):
            strides[axis] *= a["step"]
        else:
            return None
    if strides[2] != strides[3]:
        return None
    return Shortcut(node, channels.to(torch.int32).contiguous(), strides[2])
