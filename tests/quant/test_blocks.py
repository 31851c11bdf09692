"""The grid of MatMulNBits: the kernel's own numbers on any shape, packing, scales of blocks, and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pqk.core.onnxruntime_session import session
from pqk.quant.block_fake_quant import BlockFakeQuant, BlockWeightFakeQuant
from pqk.quant.blocks import (
    bits_of,
    choose_scales,
    extremes,
    in_blocks,
    pack,
    round_activations,
    round_trip,
    round_weights,
    unpack,
)
from pqk.quant.ops import gather_block_quantized_op, matmul_nbits_op

BITS = st.sampled_from([8, 4])


def kernel(op: str, inputs: dict[str, Tensor | None], constants: tuple[str, ...], **attributes: int) -> Any:
    """What ONNX Runtime's operator makes of named inputs, of which `constants` are initializers."""
    given_ = {n: t.numpy() for n, t in inputs.items() if t is not None}
    node = helper.make_node(op, [n if n in given_ else "" for n in inputs], ["y"], domain="com.microsoft", **attributes)
    feeds = {n: v for n, v in given_.items() if n not in constants}
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(given_[n], n) for n in constants if n in given_],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    return session(model.SerializeToString()).run(None, feeds)[0]


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    inputs = {"x": x, "w": weight, "s": scale, "zero_points": None, "g_idx": None, "b": bias}
    return kernel(
        "MatMulNBits", inputs, ("w", "s", "b"),
        K=x.shape[-1], N=len(weight), bits=bits_of(weight), block_size=32, accuracy_level=4,
    )  # fmt: skip


def assert_is_the_kernel(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Equal to the rounding of a sum of floats, whose terms may cancel, as may what the kernel takes off for the zero
    point; a wrong integer would be a thousandth."""
    low = extremes(bits_of(weight))[0]
    columns = ((unpack(weight).abs() - low) * scale.abs().unsqueeze(-1)).flatten(1)[:, : x.shape[-1]]
    terms = round_trip(x).abs() @ columns.t() + (0 if bias is None else bias.abs())
    off = (torch.from_numpy(product(x, weight, scale, bias)) - matmul_nbits_op(x, weight, scale, bias)).abs()
    assert bool((off <= 1e-6 * terms).all()), float((off / terms).max())


def drawn(seed: int, rows: int, columns: int, outputs: int, bits: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, packed weight, scales of both signs, bias."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-columns // 32)
    x = torch.randn(rows, columns, generator=g)
    integers = torch.randint(0, 1 << bits, (outputs, blocks, 32), generator=g, dtype=torch.uint8)
    scale = (torch.rand(outputs, blocks, generator=g) - 0.5) / 50
    return x, pack(integers, bits), scale, torch.randn(outputs, generator=g)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 200), st.integers(1, 40), BITS, st.booleans())
@example(1, 1, 126, 1, 8, False)  # terms that cancel
@example(0, 1, 1, 6, 8, False)  # one weight beside its zero point
def test_the_operator_is_the_kernel_for_any_shape(
    seed: int, rows: int, columns: int, outputs: int, bits: Any, with_bias: bool
) -> None:
    """One row or several, blocks that the input fills or not, every number of outputs."""
    x, weight, scale, bias = drawn(seed, rows, columns, outputs, bits)
    assert_is_the_kernel(x, weight, scale, bias if with_bias else None)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_the_same_numbers_alone_and_among_others(bits: Any) -> None:
    x, weight, scale, bias = drawn(5, 7, 96, 24, bits)
    together = torch.from_numpy(product(x, weight, scale, bias))
    alone = torch.cat([torch.from_numpy(product(row[None], weight, scale, bias)) for row in x])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5 * float(together.abs().max()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 6])
def test_halves_fall_as_in_the_kernel(bits: Any, rows: int) -> None:
    """Quotients that are halves to float32's precision: a division would round some of them the other way."""
    _, weight, scale, _ = drawn(1, rows, 256, 8, bits)
    g = torch.Generator().manual_seed(2)
    largest = torch.rand(rows, 8, 1, generator=g) * 3 + 0.1
    x = (torch.randint(-126, 126, (rows, 8, 32), generator=g) + 0.5) * (largest / 127)
    x[..., :1] = largest
    x = x.flatten(1)
    assert_is_the_kernel(x, weight, scale)
    divided = (in_blocks(x) / (largest / 127)).round()
    assert not torch.equal(divided, round_activations(x)[0])


def test_extremes_of_both_sides_do_not_saturate() -> None:
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 64).contiguous()
    weight = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 2, 32).contiguous()
    want = torch.tensor([[-128.0, 127.0], [128.0, -127.0]]) * 64
    assert torch.allclose(matmul_nbits_op(x, weight, torch.ones(2, 2), None), want, rtol=1e-6)
    assert_is_the_kernel(x, weight, torch.ones(2, 2))


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-42])
def test_blocks_without_a_reciprocal_are_zeros(value: float) -> None:
    x, (_, weight, scale, _) = torch.full((2, 40), value), drawn(3, 2, 40, 4, 8)
    assert not round_trip(x).any()
    np.testing.assert_array_equal(product(x, weight, scale, None), matmul_nbits_op(x, weight, scale, None).numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_table_are_those_of_the_runtime(bits: Any) -> None:
    _, weight, scale, _ = drawn(4, 1, 64, 30, bits)
    indices = torch.tensor([[0, 29, 7], [7, 1, 2]])
    got = kernel(
        "GatherBlockQuantized", {"data": weight.flatten(1), "indices": indices, "s": scale}, ("data", "s"),
        gather_axis=0, quantize_axis=1, block_size=32, bits=bits,
    )  # fmt: skip
    np.testing.assert_array_equal(got, gather_block_quantized_op(weight, scale, indices).numpy())


def test_rounding_is_half_to_even_on_the_range_of_each_block() -> None:
    x = torch.zeros(1, 64)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, 126.6])
    x[0, 32:34] = torch.tensor([-1.27, 0.018])
    want = torch.zeros(1, 64)
    want[0, :5] = torch.tensor([127.0, 0, 2, -2, 127])
    want[0, 32:34] = torch.tensor([-1.27, 0.02])
    torch.testing.assert_close(round_trip(x), want)


@given(BITS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_packing_loses_nothing(bits: Any, rows: int, blocks: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 1 << bits, (rows, blocks, 32), generator=g, dtype=torch.uint8)
    packed = pack(integers, bits)
    assert packed.shape[-1] == 4 * bits and bits_of(packed) == bits
    assert torch.equal(unpack(packed), integers.float() + extremes(bits)[0])


def test_the_first_of_two_neighbours_is_the_lower_half_of_a_byte() -> None:
    assert pack(torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 1, 32), 4)[0, 0, 0] == 0x10


@given(st.integers(0, 99), BITS, st.sampled_from(["minmax", "mse", "percentile"]))
def test_scales_cover_a_block_or_pay_for_what_they_cut(seed: int, bits: Any, method: Any) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(seed))
    errors = {}
    for each in ("minmax", method):
        scale = choose_scales(weight, bits, each, 99.99)
        low = extremes(bits)[0]
        values = (round_weights(weight, scale, bits).float() + low) * scale.unsqueeze(-1)
        errors[each] = (values - in_blocks(weight)).square().sum(-1)
        if each == "minmax":
            assert (values - in_blocks(weight)).abs().max() <= 0.5001 * scale.abs().max()
            largest = in_blocks(weight).abs().amax(-1)
            torch.testing.assert_close(scale.abs(), torch.maximum(scale.abs(), largest / -low))
    assert (errors[method] <= errors["minmax"] * 1.0001).all()


def test_the_largest_of_a_block_has_the_integer_more() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :3], weight[1, :3] = torch.tensor([8.0, 3, -7]), torch.tensor([-8.0, 3, 7])
    scale = choose_scales(weight, 4, "minmax", 99.99)
    assert scale.tolist() == [[-1.0], [1.0]]
    integers = round_weights(weight, scale, 4).int() - 8
    assert integers[:, 0, :3].tolist() == [[-8, -3, 7], [-8, 3, 7]]


def test_gradients_pass_activations_and_reach_weights_and_steps() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    BlockFakeQuant()(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())

    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    quantizer = BlockWeightFakeQuant(4, 40, 4)
    quantizer.calibrate(weight, "minmax", 99.99)
    assert quantizer.scale.shape == (8,) and bool((quantizer.sign == -1).any())
    rounded = quantizer(weight)
    assert rounded.shape == weight.shape and not torch.equal(rounded, weight)
    integers = round_weights(weight.detach(), quantizer.block_scales(), 4)
    torch.testing.assert_close(
        rounded, (integers.float() - 8).mul(quantizer.block_scales().unsqueeze(-1)).flatten(1)[:, :40]
    )
    rounded.square().sum().backward()
    assert weight.grad is not None and quantizer.scale.grad is not None
    inside = integers.flatten(1)[:, :40].float().sub(8).abs() < 7
    torch.testing.assert_close(weight.grad[inside], 2 * rounded.detach()[inside])
    step = (
        in_blocks(weight.detach()).reshape(8, 32) * quantizer.sign.unsqueeze(1) / quantizer.scale.detach().unsqueeze(1)
    )
    kept = step.round().clamp(-8, 7)
    slope = kept - step * ((step > -8) & (step < 7))
    got = in_blocks(rounded.detach()).reshape(8, 32) * quantizer.sign.unsqueeze(1)
    torch.testing.assert_close(quantizer.scale.grad, (2 * got * slope).sum(1) / (32 * 7) ** 0.5)


def test_of_a_weight_nothing_is_copied_for_the_way_back() -> None:
    """A language model's weights are most of what its training needs of memory."""
    weight, quantizer = nn.Parameter(torch.randn(16, 96)), BlockWeightFakeQuant(16, 96, 8)
    quantizer.calibrate(weight, "minmax", 99.99)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        quantizer(weight)
    own = kept.pop(weight.untyped_storage().data_ptr())
    assert own == weight.nbytes and sum(kept.values()) == weight.nbytes // 32  # a step for each block


def test_a_step_down_the_gradient_lowers_the_error_of_the_product() -> None:
    """What 4 bits make of related inputs comes nearer to the float layer's: errors make up for others."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 8, generator=g) @ torch.randn(8, 96, generator=g), torch.randn(16, 96, generator=g)
    trained, quantizer = weight.clone().requires_grad_(), BlockWeightFakeQuant(16, 96, 4)
    quantizer.calibrate(weight, "minmax", 99.99)
    optimizer = torch.optim.Adam([trained, quantizer.scale], lr=1e-3)
    errors = []
    for _ in range(150):
        error = (BlockFakeQuant()(x) @ quantizer(trained).t() - x @ weight.t()).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert sum(errors[-10:]) < 0.6 * sum(errors[:1] * 10)


@pytest.mark.parametrize("quantizer", [BlockFakeQuant(), BlockWeightFakeQuant(3, 40, 4)])
def test_off_is_the_float_network(quantizer: Any) -> None:
    x = torch.randn(3, 40)
    for mode in ("off", "observe"):
        quantizer.mode = mode
        assert torch.equal(quantizer(x), x)
