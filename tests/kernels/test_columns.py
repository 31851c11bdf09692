"""Launches that write columns of a wider tensor: what they write, what they leave, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_common import POISON, assert_matches, poison
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.kernels import columns, int8_concat, int8_conv2d, int8_linear, on_cuda
from pqk.kernels.columns import CASES, Case
from pqk.kernels.common import conv as _conv
from pqk.kernels.common.conv import Conv
from pqk.kernels.common.launch import launch
from pqk.kernels.common.triton import INTERPRETED

pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
OPS = torch.ops.pqk


def reference(case: Case) -> Tensor:
    if isinstance(case.layer, _conv.Case):
        return int8_conv2d.reference(case.layer.conv())
    return int8_linear.reference(**case.layer.arguments("cpu"))


def whole(out: Tensor, width: int) -> Tensor:
    """The wider tensor that `out` is columns of."""
    return out._base if out._base is not None else torch.empty(0, width)


@interpreted
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_a_launch_writes_its_columns_and_no_other(case: Case) -> None:
    planned = columns.specialize(case, "cpu")
    out = planned.tensor()
    room = whole(out, case.width)
    poison(room)
    launch(planned)
    want, last = reference(case), case.before + out.shape[-1]
    assert_matches(want, out.contiguous())
    others = torch.cat([room[..., : case.before], room[..., last:]], -1).view(torch.uint8)
    assert others.numel() and bool((others == POISON).all())


def conv_arguments() -> tuple[tuple[Any, ...], Conv]:
    conv = _conv.Case((2, 5, 5, 4), 6, epilogue="quantize").conv()
    names = ("x", "weight", "bias", "scale", "params", "residual", "steps", "zero_point")
    names += ("stride", "padding", "dilation", "groups", "out_dtype", "residual_channels", "residual_stride")
    return tuple(getattr(conv, n) for n in names), conv


@pytest.mark.parametrize("body", ["cpu", "cuda"])
def test_the_operators_fill_one_buffer(body: str) -> None:
    """On a CPU by the reference; by what a GPU runs, in the interpreter."""
    if body == "cuda" and not INTERPRETED:
        pytest.skip("needs Triton and TRITON_INTERPRET=1")

    def call(name: str, *arguments: Any) -> None:
        kernel = on_cuda(f"pqk::{name}") if body == "cuda" else getattr(OPS, name)
        assert kernel is not None
        kernel(*arguments)

    arguments, conv = conv_arguments()
    want = int8_conv2d.reference(conv)
    other = int8_concat.Case((2, 5, 5), (3,), (torch.uint8,)).arguments("cpu")
    buffer = OPS.concat_buffer(conv.x, [5, 5, 9], torch.uint8)
    call("int8_conv2d_into", buffer[..., :6], *arguments)
    concat = (other.inputs[0], other.params, other.steps, other.scales[0], other.zero_points[0], torch.uint8)
    call("int8_concat_into", buffer[..., 6:], *concat)
    assert torch.equal(buffer, torch.cat([want, int8_concat.reference(other)], -1))
    linear = int8_linear.Case(4, 6, 32).arguments("cpu")
    rows = OPS.concat_buffer(linear["x"], [8], torch.int8).zero_()
    call("int8_linear_into", rows[:, 2:], *linear.values())
    assert_matches(torch.nn.functional.pad(int8_linear.reference(**linear), (2, 0)), rows)


def test_an_exported_graph_keeps_the_order_of_writes() -> None:
    linear = int8_linear.Case(4, 6, 32).arguments("cpu")
    x = linear.pop("x")

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            buffer = OPS.concat_buffer(x, [12], torch.int8)
            for i in (0, 6):
                OPS.int8_linear_into(buffer[:, i : i + 6], x, **linear)
            return buffer.float() * 2

    free = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(Writes(), (x,), dynamic_shapes=free, strict=False).module()
    for rows in (x, x[:2]):
        assert torch.equal(exported(rows), int8_linear.reference(rows, **linear).repeat(1, 2).float() * 2)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (torch.zeros(2, 5, 5, 5, dtype=torch.uint8), r"out: shape is .*must be \[2, 5, 5, 6\]"),
        (torch.zeros(2, 5, 5, 6, dtype=torch.int8), "out: dtype is int8, must be uint8"),
        (torch.zeros(2, 5, 5, 12, dtype=torch.uint8)[..., ::2], "rows must be dense"),
        (torch.zeros(2, 1, 1, 6, dtype=torch.uint8).expand(2, 5, 5, 6), "out"),
    ],
)
def test_what_cannot_be_written_is_refused(out: Tensor, says: str) -> None:
    arguments, _ = conv_arguments()
    with pytest.raises(InputError, match=says):
        OPS.int8_conv2d_into(out, *arguments)


def test_a_launch_does_not_write_what_it_reads() -> None:
    arguments = int8_linear.Case(4, 6, 32).arguments("cpu")
    room = torch.zeros(4, 40, dtype=torch.int8)
    arguments["x"] = room[:, :32]
    with pytest.raises(InputError, match="shares memory with x"):
        OPS.int8_linear_into(room[:, 30:36], **arguments)
