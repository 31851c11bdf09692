"""The epilogue of a kernel: a short program of steps on an accumulator, in registers, before it is stored.

    y0 = float32(acc) * scale[n],   y = step_k(… step_2(step_1(y0)) …)

A step is an activation, a `requantize` (quantize and dequantize at once: the value that a separate layer would have
read), an `add` or a `mul` with a residual tensor, or a last `quantize`. So one launch repeats, rounding for rounding,
what a chain of separate quantized layers computes:

    relu, relu6, gelu (erf), gelu_tanh, silu, hard_swish, sigmoid
    requantize   (clamp(rint(y / scale) + zero_point, qmin, qmax) - zero_point) * out_scale
    add, mul     y + r, y * r         with r = (residual - zero_point) * scale
    quantize     clamp(rint(y / scale) + zero_point, qmin, qmax), left as an integer; last
    table        t[clamp(rint(y / scale) + zero_point, qmin, qmax) - qmin]: any function of up to 256 integers; one

Which steps is known when the kernel is compiled (four bits a step); their numbers are `params`, float32 [steps, 5], a
row a step: (scale, zero_point, qmin, qmax, out_scale) for the quantizing ones, (scale, zero_point, 0, 0, 0) for the
residual ones, zeros for activations. A float residual has scale 1 and zero point 0. Where a step is a table, `params`
has 60 rows: eight for steps, of which the first are used, and the table's numbers in the others, one after the other.

Division is IEEE division, rounding is half to even, and a NaN quantizes to qmin, as in ONNX Runtime's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels.common.checks import check_tensor
from pqk.kernels.common.triton import jit, tl

STEPS = (
    "relu", "relu6", "gelu", "gelu_tanh", "silu", "hard_swish", "sigmoid", "requantize", "add", "mul", "quantize",
    "table",
)  # fmt: skip
"""a step's code is its place here, from 1; 0 ends a program"""
MAX_STEPS = 8
PARAMS = 5
"""numbers a step"""
ENTRIES = 256
"""most numbers of a table"""
WITH_TABLE = MAX_STEPS + -(-ENTRIES // PARAMS)
"""rows of `params` where a step is a table"""
ON_GRID = ("requantize", "quantize", "table")
"""steps that round"""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8)


def names_of(steps: str) -> tuple[str, ...]:
    """`"relu,quantize"` → `("relu", "quantize")`; nothing for an empty program."""
    return tuple(steps.split(",")) if steps else ()


def encode(steps: str) -> int:
    """The program as the constant that the kernel is compiled with: four bits a step, the first one lowest."""
    return sum((STEPS.index(name) + 1) << (4 * i) for i, name in enumerate(names_of(steps)))


def reads_residual(steps: str) -> bool:
    """Whether the program needs a residual tensor."""
    return not {"add", "mul"}.isdisjoint(names_of(steps))


def program(*rows: tuple[str, *tuple[float, ...]], table: Sequence[float] = ()) -> tuple[str, Tensor]:
    """`program(("relu",), ("quantize", 0.1, 3, 0, 255))` → the words `"relu,quantize"` and their params [2, 5].

    `table`: the numbers that a table step picks from, params then have `WITH_TABLE` rows.
    """
    params = torch.zeros(WITH_TABLE if table else len(rows), PARAMS)
    for i, (_, *numbers) in enumerate(rows):
        params[i, : len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
    params[MAX_STEPS:].view(-1)[: len(table)] = torch.tensor(table, dtype=torch.float32)
    return ",".join(name for name, *_ in rows), params


def rows_of(steps: str, params: Tensor) -> Tensor:
    """The rows of `params` that belong to steps: all but a table."""
    return params[: len(names_of(steps))]


def check_steps(
    steps: str,
    params: Tensor,
    residual: Tensor | None,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise `InputError` unless the program is one, and `params`, `residual` and `out_dtype` fit it.

    The values of `params` are not read here, which would wait for the GPU; `check_params` reads them, once.
    """
    names = names_of(steps)
    for name in names:
        if name not in STEPS:
            raise InputError(f'steps "{steps}": no step is named "{name}" (known: {", ".join(STEPS)})')
    if len(names) > MAX_STEPS:
        raise InputError(f'steps "{steps}": {len(names)} steps, at most {MAX_STEPS} fit')
    if "quantize" in names[:-1]:
        raise InputError(f'steps "{steps}": quantize must come last; a requantize leaves a float')
    dtypes = INTEGERS if names[-1:] == ("quantize",) else FLOATS
    if out_dtype not in dtypes:
        last = "end in quantize" if dtypes is INTEGERS else "do not end in quantize"
        raise InputError(f'steps "{steps}" {last}: out_dtype {out_dtype} must be one of {[str(d) for d in dtypes]}')
    if names.count("table") > 1:
        raise InputError(f'steps "{steps}": {names.count("table")} tables, there is room for one')
    rows = WITH_TABLE if "table" in names else len(names)
    check_tensor("params", params, torch.float32, device=device, shape=(rows, PARAMS))
    if reads_residual(steps) != (residual is not None):
        need = "needs a residual tensor" if residual is None else "reads no residual, but one is given"
        raise InputError(f'steps "{steps}": {need}')
    if residual is not None:
        check_tensor("residual", residual, (*INTEGERS, *FLOATS), device=device, shape=shape)


def check_params(steps: str, params: Tensor) -> None:
    """Raise `InputError` for numbers that make no sense: a scale that is not finite and above 0, an empty range."""
    for i, (name, row) in enumerate(zip(names_of(steps), rows_of(steps, params).tolist(), strict=True)):
        scale, zero_point, qmin, qmax, out_scale = row
        where = f'step {i} ({name}) of "{steps}"'
        scales = (scale, out_scale) if name == "requantize" else (scale,) if name in (*ON_GRID, "add", "mul") else ()
        for s in scales:
            if not (math.isfinite(s) and s > 0):
                raise InputError(f"{where}: scale {s}; must be finite and above 0")
        least = -255 if name == "requantize" else -128  # an integer less its zero point never leaves the register
        if name in ON_GRID and not (least <= qmin <= zero_point <= qmax <= 255):
            raise InputError(
                f"{where}: qmin {qmin} ≤ zero point {zero_point} ≤ qmax {qmax} does not hold in [{least}, 255]"
            )


def _on_grid(y: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    y = torch.round(y / scale) + zero_point
    return torch.where(y.isnan(), qmin, torch.clamp(y, qmin, qmax))


def _sigmoid(y: Tensor) -> Tensor:
    t = torch.exp(-y.abs())
    return torch.where(y >= 0, 1.0, t) / (t + 1.0)


def _apply(y: Tensor, name: str, row: Tensor, table: Tensor, residual: Tensor | None) -> Tensor:
    """One step of the reference; the operations and their order are those of `_step`."""
    scale, zero_point, qmin, qmax, out_scale = row
    match name:
        case "relu":
            return torch.relu(y)
        case "relu6":
            return torch.clamp(y, 0.0, 6.0)
        case "gelu":
            return y * 0.5 * (torch.erf(y * 0.7071067811865476) + 1.0)
        case "gelu_tanh":
            return y * _sigmoid(y * 1.5957691216057308 * (y * y * 0.044715 + 1.0))
        case "silu":
            return y * _sigmoid(y)
        case "hard_swish":
            return y * torch.clamp(y + 3.0, 0.0, 6.0) / 6.0
        case "sigmoid":
            return _sigmoid(y)
        case "requantize":
            return (_on_grid(y, scale, zero_point, qmin, qmax) - zero_point) * out_scale
        case "quantize":
            return _on_grid(y, scale, zero_point, qmin, qmax)
        case "table":
            return table[(_on_grid(y, scale, zero_point, qmin, qmax) - qmin).long()]
    assert residual is not None, name
    r = (residual.to(torch.float32) - zero_point) * scale
    return y + r if name == "add" else y * r


def apply_steps(y: Tensor, steps: str, params: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The reference: float32 `y` of any shape through the program; `residual` has its shape. → `out_dtype`."""
    for name, row in zip(names_of(steps), rows_of(steps, params), strict=True):
        y = _apply(y, name, row, params[MAX_STEPS:].reshape(-1), residual)
    return y.to(out_dtype)


@jit
def on_grid(y, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
    """`clamp(rint(y / scale) + zero_point, qmin, qmax)`, as a float. `tl.maximum` gives qmin for a NaN.

    Rounding adds 1.5 * 2**23, which leaves no bit for a fraction: half to even for |y / scale| up to 2**22. Beyond it
    the result is less exact but no smaller than 2**21, so that clamping it to a grid gives the same.
    """
    y = ((tl.div_rn(y, scale) + 12582912.0) - 12582912.0) + zero_point
    return tl.minimum(tl.maximum(y, qmin), qmax)


@jit
def sigmoid(y):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-y)), with an exponential that cannot overflow."""
    t = tl.exp(-tl.abs(y))
    return tl.div_rn(tl.where(y >= 0.0, 1.0, t), t + 1.0)


@jit
def _relu_to(y, top):  # type: ignore[no-untyped-def]
    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, top, propagate_nan=tl.PropagateNan.ALL)


@jit
def _step(y, S: tl.constexpr, row_ptr, table_ptr, residual_ptr, residual_offsets, mask):  # type: ignore[no-untyped-def]
    """One step; `S` is its code. `row_ptr` points at its five numbers, `table_ptr` at a table's."""
    if S == 1:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif S == 2:
        y = _relu_to(y, 6.0)
    elif S == 3:
        y = y * 0.5 * (tl.erf(y * 0.7071067811865476) + 1.0)
    elif S == 4:
        y = y * sigmoid(y * 1.5957691216057308 * (y * y * 0.044715 + 1.0))
    elif S == 5:
        y = y * sigmoid(y)
    elif S == 6:
        y = tl.div_rn(y * _relu_to(y + 3.0, 6.0), 6.0)
    elif S == 7:
        y = sigmoid(y)
    elif S == 8 or S == 11 or S == 12:
        zero_point = tl.load(row_ptr + 1)
        y = on_grid(y, tl.load(row_ptr), zero_point, tl.load(row_ptr + 2), tl.load(row_ptr + 3))
        if S == 8:
            y = (y - zero_point) * tl.load(row_ptr + 4)
        if S == 12:
            y = tl.load(table_ptr + (y - tl.load(row_ptr + 2)).to(tl.int32))
    elif S == 9 or S == 10:
        r = tl.load(residual_ptr + residual_offsets, mask=mask, other=0).to(tl.float32)
        r = (r - tl.load(row_ptr + 1)) * tl.load(row_ptr)
        y = y + r if S == 9 else y * r
    return y


@jit
def epilogue(  # type: ignore[no-untyped-def]
    y,
    STEPS: tl.constexpr,
    params_ptr,
    residual_ptr,
    residual_offsets,
    mask,
    MOST: tl.constexpr = MAX_STEPS,
    NUMBERS: tl.constexpr = PARAMS,
):
    """float32 `y` through the program `STEPS` (see `encode`) → float32; integers where it ends in quantize.

    `residual_offsets` and `mask` have the shape of `y`; `residual_ptr` may be None where no step reads it. The last two
    are no choice of the caller's: a kernel reads constants of its module as defaults.
    """
    for i in tl.static_range(MOST):
        if (STEPS >> (4 * i)) & 15 != 0:
            row_ptr, table_ptr = params_ptr + NUMBERS * i, params_ptr + NUMBERS * MOST
            y = _step(y, (STEPS >> (4 * i)) & 15, row_ptr, table_ptr, residual_ptr, residual_offsets, mask)
    return y


def exact_dtype(terms: int, largest: int = 128 * 128) -> torch.dtype:
    """The float dtype whose matmul or convolution of integers is exact: sums of `terms` products up to `largest`.

    torch has no int32 matmul on CUDA and a slow one on a CPU; a float of 24 (53) bits sums integers below 2**24 (2**53)
    without rounding, in any order.
    """
    return torch.float32 if terms * largest <= 1 << 24 else torch.float64


def centred(x: Tensor) -> Tensor:
    """int8 as it is, uint8 less 128 as int8: the operand that kernels multiply (`x ^ 128`, read as signed)."""
    return x if x.dtype == torch.int8 else (x ^ 128).view(torch.int8)


def fold_bias(bias: Tensor | None, weight: Tensor, zero_point: int, x_dtype: torch.dtype) -> Tensor:
    """The int32 [N] vector that the kernels add to Σ centred(x) * w, for weights [N, …] and the zero point of `x`.

    Σ (x - zp) * w + bias = Σ centred(x) * w + (shift - zp) * Σ w + bias, with shift 128 for uint8 and 0 for int8.
    """
    sums = weight.flatten(1).to(torch.int64).sum(1)
    shift = 128 if x_dtype == torch.uint8 else 0
    folded = (shift - zero_point) * sums + (0 if bias is None else bias.to(torch.int64))
    if folded.numel() and int(folded.abs().max()) >= 1 << 31:
        raise InputError(f"bias: {int(folded.abs().max())} with the zero point folded in does not fit int32")
    return folded.to(torch.int32)


def scaled(acc: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """float32 `(acc + bias) * scale` of exact integers `acc` [..., N] in a float dtype, with int32 wrap-around."""
    total = (acc.to(torch.int64) + bias).to(torch.int32)
    return total.to(torch.float32) * scale
