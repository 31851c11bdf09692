"""The table of ATen operators: complete, real, and true of what torch computes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pqk.core import aten as table
from pqk.core.aten import DEQUANTIZE, OPERATORS, QUANTIZE, Operator, aten, bounds
from pqk.kernels.common import epilogue
from pqk.passes.fuse.epilogue import CLAMP_STEPS, function

ROOT = Path(__file__).parents[2]
ROWS = {str(row.overload): row for row in OPERATORS}


# ---- complete


def overloads(path: Path) -> Iterator[str]:
    """`aten.add.Tensor` and the like, wherever a file names one: behind `aten` or `torch.ops.aten`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node).removeprefix("torch.ops.")
            if re.fullmatch(r"aten\.\w+\.\w+", name):
                yield name


def test_every_operator_that_is_named_has_a_row() -> None:
    files = [path for folder in ("pqk", "passes", "models") for path in sorted((ROOT / folder).rglob("*.py"))]
    named = {name: path for path in files for name in overloads(path)}
    assert len(named) > 80, "the walk finds what passes name"
    assert not {name: str(path.relative_to(ROOT)) for name, path in named.items() if name not in ROWS}


def test_the_walk_sees_both_spellings_and_skips_others() -> None:
    walked = {*overloads(ROOT / "pqk/core/aten.py"), *overloads(Path(__file__))}
    assert {"aten.add.Tensor", "aten.polar.default"} <= walked and "aten.reshape" not in walked
    assert torch.ops.aten.polar.default is not None


def test_every_operator_of_the_integer_graph_has_a_row() -> None:
    registered = re.findall(r'custom_op\("pqk::(\w+)"', (ROOT / "pqk/quant/ops.py").read_text())
    assert len(registered) == 6 and {f"pqk.{name}.default" for name in registered} <= ROWS.keys()


def test_a_row_is_a_real_overload_and_stands_once() -> None:
    assert len(ROWS) == len(OPERATORS)
    assert all(isinstance(row.overload, torch._ops.OpOverload) for row in OPERATORS)


# ---- selections


def names(selection: Any) -> set[str]:
    return {str(overload).removeprefix("aten.") for overload in selection}


CLAMPS = {"relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default"}
SCALED = {"pqk.quantize.default", "pqk.dequantize.default"}
VIEWS = {
    "reshape.default", "flatten.using_ints", "unflatten.int", "permute.default", "transpose.int", "t.default",
    "slice.Tensor", "select.int", "squeeze.dim", "squeeze.dims", "squeeze.default", "unsqueeze.default",
    "expand.default",
}  # fmt: skip
SELECTIONS = {
    "OUTPUT_AXIS": {
        "conv1d.default", "conv2d.default", "conv3d.default", "linear.default", "conv_transpose1d.default",
        "conv_transpose2d.input", "conv_transpose3d.input",
    },
    "WEIGHTED": {"conv1d.default", "conv2d.default", "conv3d.default", "linear.default"},
    "PRODUCTS": {"matmul.default", "bmm.default"},
    "FLOAT_OUTPUT": {"linear.default", "matmul.default", "bmm.default"},
    "LIGHT": {
        "add.Tensor", "mul.Tensor", "cat.default", "mean.dim", "avg_pool2d.default", "sigmoid.default",
        "leaky_relu.default",
    },
    "FOLLOWS_INPUTS": {"add.Tensor", "mean.dim", "avg_pool2d.default"},
    "CLAMPS": CLAMPS,
    "SAME_SHAPE": {
        "add.Tensor", "mul.Tensor", "layer_norm.default", "rms_norm.default",
        "gelu.default", "relu.default", "tanh.default",
        "linear.default",
    },
    "BY_ROW": {
        *SCALED, *CLAMPS, "layer_norm.default", "rms_norm.default",
        "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor",
        "gelu.default", "tanh.default", "sigmoid.default", "leaky_relu.default", "elu.default",
    },
    "POINTWISE": {
        *SCALED, *CLAMPS, "mul.Tensor", "add.Tensor", "sub.Tensor", "div.Tensor", "sigmoid.default", "tanh.default",
        "leaky_relu.default", "gelu.default", "elu.default", "exp.default", "softplus.default", "mish.default",
        "neg.default", "abs.default",
    },
    "MOVEMENT": VIEWS | {"pad.default", "constant_pad_nd.default", "max_pool2d.default", "index_select.default"},
    "VIEWS": VIEWS,
    "RESHAPES": {"reshape.default", "flatten.using_ints", "unflatten.int"},
    "PADS": {"pad.default", "constant_pad_nd.default"},
    "SHORTCUTS": {"pad.default", "constant_pad_nd.default", "slice.Tensor", "index_select.default"},
    "NO_OPS": {
        "dropout.default", "feature_dropout.default", "alpha_dropout.default",
        "feature_alpha_dropout.default", "detach.default", "alias.default",
        "lift_fresh_copy.default", "contiguous.default", "clone.default",
    },
    "GUARDS": {
        "_assert_tensor_metadata.default", "_assert_scalar.default", "sym_constrain_range_for_size.default",
    },
    "QUANTIZERS": {"pqk.quantize.default", "pqk.quantize_dynamic_linear.default"},
    "TAKES_SCALE": SCALED,
}  # fmt: skip
"""what the selections were when each was a tuple of its own: compiled students depend on every one of them"""


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_what_it_was(name: str) -> None:
    assert names(getattr(table, name)) == SELECTIONS[name]


def test_autograd_names_are_what_they_were() -> None:
    assert {
        "Add", "Mul", "Relu", "Threshold", "Hardtanh", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardswish",
        "Sigmoid", "Hardsigmoid", "Clamp", "MaxPool", "AvgPool", "AdaptiveAvgPool", "MkldnnAdaptiveAvgPool", "Dropout",
        "NativeDropout", "FeatureDropout", "Clone", "ToCopy",
    } == table.SAME_CHANNELS  # fmt: skip


def test_traits_that_imply_others() -> None:
    for row in OPERATORS:
        assert not row.weighted or row.output_axis == 0, row
        assert not row.follows_inputs or row.light, row
        assert row.moves or not (row.view or row.reshapes or row.pads or row.shortcut), row
        assert row.limits is None or (row.pointwise and row.by_row), row
        assert not (row.light and (row.weighted or row.product)), row


def test_every_step_is_one_of_the_kernels() -> None:
    steps = {*table.STEPS.values(), *table.RESIDUAL_STEPS.values(), *CLAMP_STEPS.values(), "gelu_tanh"}
    assert steps <= set(epilogue.STEPS)
    assert {name for name in epilogue.STEPS if epilogue.reads_residual(name)} == {*table.RESIDUAL_STEPS.values()}


# ---- true

SCALE, ZERO = torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)
OTHER = torch.full((1,), 0.75)
SPATIAL = {aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default}
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.add.Tensor: (OTHER,),
    aten.sub.Tensor: (OTHER,),
    aten.mul.Tensor: (OTHER,),
    aten.div.Tensor: (OTHER,),
    aten.hardtanh.default: (-0.5, 0.5),
    aten.clamp.default: (-0.5, 0.5),
    aten.clamp_min.default: (0.0,),
    aten.threshold.default: (0.0, 0.0),
    aten.layer_norm.default: ([4],),
    aten.rms_norm.default: ([4],),
    QUANTIZE: (SCALE, ZERO, 0, 255),
    DEQUANTIZE: (SCALE, ZERO),
    aten.reshape.default: ([3, 2, 2, 2],),
    aten.flatten.using_ints: (1,),
    aten.unflatten.int: (2, [2, 2]),
    aten.permute.default: ([2, 0, 1],),
    aten.transpose.int: (0, 2),
    aten.slice.Tensor: (1, 1, 3),
    aten.select.int: (1, 2),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0, 1],),
    aten.unsqueeze.default: (1,),
    aten.expand.default: ([5, 2, 3, 4],),
    aten.pad.default: ([1, 2],),
    aten.constant_pad_nd.default: ([1, 2],),
    aten.index_select.default: (1, torch.tensor([2, 0])),
    aten.avg_pool2d.default: ([2, 2],),
    aten.max_pool2d.default: ([2, 2],),
    aten.adaptive_avg_pool2d.default: ([2, 2],),
    aten.dropout.default: (0.5, False),
    aten.feature_dropout.default: (0.5, False),
    aten.alpha_dropout.default: (0.5, False),
    aten.feature_alpha_dropout.default: (0.5, False),
}
"""behind the first one"""


def computed(row: Operator, x: Tensor) -> Tensor:
    keywords = {"dtype": torch.float64} if row.overload is aten._to_copy.default else {}
    result = row.overload(x, *ARGUMENTS.get(row.overload, ()), **keywords)
    assert isinstance(result, Tensor)
    return result


def values(row: Operator, *size: int) -> Tensor:
    """Distinct values of what the operator takes."""
    count = int(torch.Size(size).numel())
    if row.overload is DEQUANTIZE:
        return torch.arange(count, dtype=torch.uint8).reshape(size)
    return torch.linspace(-2.0, 2.1, count).reshape(size)


def with_trait(trait: Callable[[Operator], object]) -> Any:
    rows = [row for row in OPERATORS if trait(row)]
    return pytest.mark.parametrize("row", rows, ids=[str(row.overload) for row in rows])


@with_trait(lambda row: row.pointwise)
def test_pointwise_operators_see_one_element_at_a_time(row: Operator) -> None:
    x = values(row, 2, 3, 4)
    alone = [computed(row, element.reshape(1)).reshape(()) for element in x.flatten()]
    torch.testing.assert_close(computed(row, x).flatten(), torch.stack(alone), rtol=1e-6, atol=1e-6)


@with_trait(lambda row: row.by_row)
def test_operators_by_row_see_one_row_at_a_time(row: Operator) -> None:
    x = values(row, 2, 3, 4)
    rows = computed(row, x.reshape(6, 4))
    torch.testing.assert_close(computed(row, x).reshape(6, 4), rows, rtol=1e-6, atol=1e-6)


@with_trait(lambda row: row.same_shape and row.overload is not aten.linear.default)
def test_operators_keep_the_axes(row: Operator) -> None:
    assert computed(row, values(row, 2, 3, 4)).shape == (2, 3, 4)


@with_trait(lambda row: row.moves)
def test_movement_makes_no_values_of_its_own(row: Operator) -> None:
    size = {aten.t.default: (3, 4), aten.max_pool2d.default: (1, 2, 4, 4)}.get(row.overload, (2, 3, 4))
    x = values(row, *size)
    moved = computed(row, x)
    assert set(moved.flatten().tolist()) <= {*x.flatten().tolist(), *([0.0] if row.pads else [])}
    if row.overload is not aten.max_pool2d.default:  # for which torch has no kernel of its own on integers
        integers = torch.arange(x.numel(), dtype=torch.uint8).reshape(size)
        assert computed(row, integers).shape == moved.shape


@with_trait(lambda row: row.view)
def test_views_take_no_memory(row: Operator) -> None:
    x = values(row, *((3, 4) if row.overload is aten.t.default else (2, 3, 4)))
    assert computed(row, x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@with_trait(lambda row: row.reshapes)
def test_reshapes_keep_the_order(row: Operator) -> None:
    x = values(row, 2, 3, 4)
    assert torch.equal(computed(row, x).flatten(), x.flatten())


@with_trait(lambda row: row.no_op)
def test_no_ops_do_nothing(row: Operator) -> None:
    x = values(row, 2, 3, 4)
    assert torch.equal(computed(row, x), x)


@with_trait(lambda row: row.limits)
def test_the_bounds_of_a_clamp_are_those_that_it_keeps(row: Operator) -> None:
    graph = fx.Graph()
    node = graph.call_function(row.overload, (graph.placeholder("x"), *ARGUMENTS.get(row.overload, ())))
    found, result = bounds(node), computed(row, torch.linspace(-9, 9, 99))
    assert found is not None and float(result.min()) == found[0]
    assert float(result.max()) == (9.0 if found[1] is None else found[1])


@with_trait(lambda row: (row.autograd and not row.no_op) or row.overload is aten.clone.default)
def test_autograd_calls_it_so(row: Operator) -> None:
    """Dropout has its names on other devices; on a CPU it is a product."""
    x = torch.linspace(-2.0, 2.1, 72).reshape(1, 2, 6, 6).requires_grad_(True)
    gradient = computed(row, x).grad_fn
    assert gradient is not None
    assert re.sub(r"(\dD)?(WithIndices)?Backward\d+$", "", gradient.name()) in row.autograd


# ---- what a launch takes in


@pytest.mark.parametrize(
    ("target", "arguments", "step"),
    [
        (aten.gelu.default, {}, "gelu"),
        (aten.gelu.default, {"approximate": "tanh"}, "gelu_tanh"),
        (aten.sigmoid.default, {}, "sigmoid"),
        (aten.relu.default, {}, "relu"),
        (aten.relu6.default, {}, "relu6"),
        (aten.hardtanh.default, {"min_val": 0, "max_val": 6}, "relu6"),
        (aten.hardtanh.default, {}, None),
        (aten.clamp.default, {"min": 0}, "relu"),
        (aten.clamp.default, {"min": 0, "max": 6.0}, "relu6"),
        (aten.clamp.default, {"max": 6.0}, None),
        (aten.clamp_min.default, {"min": 0.0}, "relu"),
        (aten.clamp_min.default, {"min": -1.0}, None),
        (aten.tanh.default, {}, None),
        (aten.add.Tensor, {"other": 1.0}, None),
    ],
)
def test_the_step_that_an_activation_is(target: Any, arguments: dict[str, Any], step: str | None) -> None:
    graph = fx.Graph()
    assert function(graph.call_function(target, (graph.placeholder("x"),), arguments)) == step
