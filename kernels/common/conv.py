"""Shared by the convolution kernels: the arguments of a call, their checks, the taps of the reference, test cases.

Layout is NHWC: activations [N, H, W, C], weights [O, KH, KW, C / groups], outputs [N, OH, OW, O], all contiguous. A
tensor that is not is refused rather than copied: the copy would be a launch that nobody asked for.

Activations are centred first: `s8(x) = x - 128` for uint8, `x` for int8, and the caller folds the zero point into the
int32 `bias` (`epilogue.fold_bias`). Padding reads the zero point, so that it adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_scale, check_tensor, example
from pqk.kernels.common.configs import Config, chosen, fitting
from pqk.kernels.common.epilogue import (
    FLOATS,
    INTEGERS,
    apply_steps,
    centred,
    check_steps,
    encode,
    program,
    reads_residual,
    scaled,
)
from pqk.kernels.common.gpu import Gpu
from pqk.kernels.common.launch import TYPES, cdiv

MAX_TERMS = (1 << 16) - 1
"""products an accumulator sums: so many of at most 2**14, and a bias of at most 2**30, stay within int32"""
MAX_ROWS = (1 << 31) - 4096
"""output pixels of a launch: a block that reaches beyond them still counts in 32 bits"""
MAX_BLOCK = 128
"""output pixels of a block, at most"""


@dataclass(frozen=True)
class Conv:
    """The arguments of `pqk::int8_conv2d` and `pqk::int8_depthwise_conv2d`, in their order.

    `x` [N, H, W, C] uint8 or int8; `weight` int8 [O, KH, KW, C / groups]; `bias` int32 [O], zero point folded in;
    `scale` float32 [O], of x times that of the weight; `steps`, `params`, `residual`: see `epilogue`; `zero_point` of
    `x`, which padding reads; `stride`, `padding` (both sides), `dilation`: [along H, along W]. `out_dtype` int32, with
    no steps, gives the accumulators, bias added.

    `residual` is of the output's shape, or, of `int8_conv2d` only, a shortcut that is strided and padded while it is
    read: with `residual_channels`, int32 [O], output (y, x, o) adds pixel (y, x) * `residual_stride` of `residual`
    [N, RH, RW, RC], channel `residual_channels[o]`, and the integer 0 where that is -1.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    params: Tensor
    residual: Tensor | None
    steps: str
    zero_point: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    out_dtype: torch.dtype
    residual_channels: Tensor | None = None
    residual_stride: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        """(KH, KW)."""
        return self.weight.shape[1], self.weight.shape[2]

    @property
    def terms(self) -> int:
        """Products in one output: KH * KW * C / groups."""
        return self.weight.shape[1] * self.weight.shape[2] * self.weight.shape[3]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, OH, OW, O)."""
        spans = zip(self.x.shape[1:3], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans)
        return self.x.shape[0], height, width, self.weight.shape[0]

    @property
    def rows(self) -> int:
        """Output pixels in the batch."""
        return self.out_shape[0] * self.out_shape[1] * self.out_shape[2]

    @property
    def key(self) -> str:
        """The shape in words, under which a choice of configuration is remembered."""
        (n, h, w, c), (o, kh, kw, _) = self.x.shape, self.weight.shape
        (down, along), (top, left), (dy, dx) = self.stride, self.padding, self.dilation
        window = f"{kh}x{kw} stride={down},{along} padding={top},{left} dilation={dy},{dx} groups={self.groups}"
        return f"{n}x{h}x{w}x{c} {window} out={o} {TYPES[self.x.dtype]}"

    def check(self) -> None:
        """Raise `InputError` for arguments that neither op takes; how the weight lies in memory is left to each."""
        device = self.x.device
        check_tensor("x", self.x, INTEGERS, shape=(-1, -1, -1, -1))
        check_tensor("weight", self.weight, torch.int8, device=device, shape=(-1, -1, -1, -1), contiguous=False)
        self._check_geometry()
        out = self.out_shape
        check_tensor("bias", self.bias, torch.int32, device=device, shape=out[3:])
        check_scale("scale", self.scale, device=device, shape=out[3:])
        low, high = (0, 255) if self.x.dtype == torch.uint8 else (-128, 127)
        if not low <= self.zero_point <= high:
            raise InputError(f"zero_point: {self.zero_point} is not a {self.x.dtype}, [{low}, {high}]")
        if self.out_dtype != torch.int32:
            shape = out if self.residual_channels is None else self._check_shortcut()
            check_steps(self.steps, self.params, self.residual, shape, self.out_dtype, device)
        elif self.steps or self.residual is not None:
            raise InputError(
                f'out_dtype int32 gives the accumulators; steps "{self.steps}" and a residual need another'
            )

    def _check_shortcut(self) -> tuple[int, ...]:
        """The shape of a residual that is strided and padded as it is read."""
        channels, residual, stride = self.residual_channels, self.residual, self.residual_stride
        assert channels is not None
        images, height, width, outputs = self.out_shape
        check_tensor("residual_channels", channels, torch.int32, device=self.x.device, shape=(outputs,))
        if residual is None or residual.ndim != 4 or stride < 1:
            raise InputError(f"residual: a residual [N, H, W, C] and a stride of at least 1 are needed, not {stride}")
        if [-(-n // stride) for n in residual.shape[1:3]] != [height, width]:
            raise InputError(
                f"residual: every {stride}. pixel of {list(residual.shape)} is not {height} x {width} pixels"
            )
        return images, *residual.shape[1:]

    def _check_geometry(self) -> None:
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise InputError(f"{name}: {list(pair)}; must be two integers of at least {least}, along H and W")
        channels, (outputs, *kernel, inner) = self.x.shape[3], self.weight.shape
        if min(kernel) < 1 or inner < 1:
            raise InputError(f"weight: shape {list(self.weight.shape)} has no taps; KH, KW and C / groups must be ≥ 1")
        if self.groups < 1 or inner * self.groups != channels or outputs % self.groups:
            raise InputError(
                f"groups: {self.groups} groups of {inner} input channels and {outputs} outputs (weight "
                f"{list(self.weight.shape)}) do not fit x with {channels} channels"
            )
        if min(self.out_shape[1:3]) < 1:
            raise InputError(
                f"x: {self.x.shape[1]} x {self.x.shape[2]} pixels with padding {list(self.padding)} are fewer than a "
                f"kernel of {kernel[0]} x {kernel[1]} with dilation {list(self.dilation)} spans"
            )

    def allocate(self) -> Tensor:
        """The output, not yet written."""
        return allocate(self.out_shape, self.out_dtype, self.x.device)

    def empty(self) -> Tensor:
        """A stand-in for the output, for tracing."""
        return self.x.new_empty(self.out_shape, dtype=self.out_dtype)

    def launch_args(self, out: Tensor) -> dict[str, Tensor | int | None]:
        """The arguments that both kernels have, by their names there."""
        _, height, width, _ = self.x.shape
        _, out_height, out_width, _ = self.out_shape
        return {
            "x_ptr": self.x, "weight_ptr": self.weight, "bias_ptr": self.bias, "scale_ptr": self.scale,
            "params_ptr": self.params, "residual_ptr": self.residual, "out_ptr": out,
            "rows": self.rows, "height": height, "width": width, "out_height": out_height, "out_width": out_width,
            "zero_point": self.zero_point,
        }  # fmt: skip

    def launch_constants(self, config: Config) -> dict[str, int]:
        """The compile-time constants that both kernels have, by their names there."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        return {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw,
            "STEPS": encode(self.steps), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        }  # fmt: skip

    def chosen(self, op: str, gpu: Gpu, choose: Callable[[Conv, Gpu], Config], configs: Sequence[Config]) -> Config:
        """The configuration known for this shape, or that of `choose` among those of `configs` that fit the GPU."""
        return chosen(op, self.key, gpu, lambda: choose(self, gpu), lambda: fitting(configs, gpu))

    def taps(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """`(ky, kx, pixels)` of each tap: the centred input pixel of every output pixel, [N, OH, OW, C] `dtype`."""
        (top, left), (down, along), (dy, dx) = self.padding, self.stride, self.dilation
        border = self.zero_point - (128 if self.x.dtype == torch.uint8 else 0)
        padded = pad(centred(self.x), (0, 0, left, left, top, top), value=border).to(dtype)
        _, height, width, _ = self.out_shape
        for ky, kx in product(*map(range, self.kernel)):
            rows = slice(ky * dy, ky * dy + (height - 1) * down + 1, down)
            columns = slice(kx * dx, kx * dx + (width - 1) * along + 1, along)
            yield ky, kx, padded[:, rows, columns]

    def finish(self, acc: Tensor) -> Tensor:
        """Exact integers `acc` [N, OH, OW, O] of any dtype → the output, by the reference."""
        if self.out_dtype == torch.int32:
            return (acc.to(torch.int64) + self.bias).to(torch.int32)
        y = scaled(acc, self.bias, self.scale)
        return apply_steps(y, self.steps, self.params, self.added(), self.out_dtype)

    def added(self) -> Tensor | None:
        """The residual in the output's shape."""
        channels, residual = self.residual_channels, self.residual
        if channels is None or residual is None:
            return residual
        pixels = residual[:, :: self.residual_stride, :: self.residual_stride]
        return pixels[..., channels.clamp(min=0).long()] * (channels >= 0).to(residual.dtype)


def why_not_launched(conv: Conv) -> Reason | None:
    """Why no kernel of ours takes a call of this size, else None.

    Batches may be of any size. Within the images of one block, and within its rows of the output, offsets are 32 bits.
    """
    if conv.terms > MAX_TERMS:
        return f"{conv.terms} products an output could overflow int32; at most {MAX_TERMS} cannot"
    if conv.rows > MAX_ROWS:
        return f"{conv.rows} output pixels do not fit a 32-bit index; split the batch"
    _, height, width, outputs = conv.out_shape
    images = cdiv(MAX_BLOCK, max(height * width, 1)) + 1
    reach = (conv.x.shape[1] + 2 * conv.padding[0]) * (conv.x.shape[2] + 2 * conv.padding[1]) * conv.x.shape[3]
    if conv.residual_channels is not None and conv.residual is not None:
        reach = max(reach, conv.residual[0].numel())
    if max(images * reach, MAX_BLOCK * outputs, conv.weight.numel()) >= 1 << 31:
        return f"images of {reach} bytes or {outputs} outputs are beyond the 32-bit offsets of a block"
    return None


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced. `epilogue` is a key of `EPILOGUES`."""

    x: tuple[int, int, int, int]
    """N, H, W, C"""
    out: int
    """output channels"""
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.uint8
    epilogue: str = "relu"
    shortcut: bool = False
    """the residual has twice the pixels along each axis and half the channels, in the middle"""

    def conv(self, device: str = "cpu", seed: int = 0) -> Conv:
        """Arguments of this case with random integers of the whole range; on `meta` only their shapes."""
        weight = example((self.out, *self.kernel, self.x[3] // self.groups), torch.int8, device, seed + 1)
        scale = example((self.out,), torch.float32, "cpu", seed + 2).abs() + 0.5
        scale /= 5400 * max(weight[0].numel(), 1) ** 0.5  # 5400 is the variance of int8: outputs of about ±1
        steps, params, out_dtype = epilogue_of(self.epilogue, self.dtype)
        conv = Conv(
            x=example(self.x, self.dtype, device, seed),
            weight=weight,
            bias=example((self.out,), torch.int32, device, seed + 3),
            scale=scale.to(device),
            params=params.to(device),
            residual=None,
            steps=steps,
            zero_point=117 if self.dtype == torch.uint8 else 0,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            out_dtype=out_dtype,
        )
        if not reads_residual(steps):
            return conv
        if not self.shortcut:
            return replace(conv, residual=example(conv.out_shape, self.dtype, device, seed + 4))
        images, height, width, _ = conv.out_shape
        half, before = self.out // 2, self.out // 4
        channels = [c - before if 0 <= c - before < half else -1 for c in range(self.out)]
        return replace(
            conv,
            residual=example((images, 2 * height, 2 * width, half), self.dtype, device, seed + 4),
            residual_channels=torch.tensor(channels, dtype=torch.int32, device=device),
            residual_stride=2,
        )


EPILOGUES: dict[str, tuple[tuple[str, *tuple[float, ...]], ...]] = {
    "int32": (),
    "float": (),
    "half": (("relu6",),),
    "quantize": (("quantize", 0.02, 5),),
    "relu": (("relu",), ("quantize", 0.01, 3)),
    "hard_swish": (("requantize", 0.02, 4, 0, 0, 0.02), ("hard_swish",), ("quantize", 0.01, 7)),
    "residual": (("requantize", 0.02, 4, 0, 0, 0.021), ("add", 0.013, 9), ("relu",), ("quantize", 0.015, 2)),
}
"""programs of `Case`; the bounds of a quantizing step are those of the grid"""


def epilogue_of(name: str, dtype: torch.dtype) -> tuple[str, Tensor, torch.dtype]:
    """(steps, params, out_dtype) of `EPILOGUES[name]` on the grid of `dtype`: all of uint8, or symmetric int8."""
    rows: list[tuple[str, *tuple[float, ...]]] = []
    low, high = (0, 255) if dtype == torch.uint8 else (-127, 127)
    for row in EPILOGUES[name]:
        step, numbers = row[0], list(row[1:])
        if numbers and dtype == torch.int8:
            numbers[1] = 0
        if step in ("quantize", "requantize"):
            numbers[2:4] = [low, high]
        rows.append((step, *numbers))
    steps, params = program(*rows)
    floats = {"int32": torch.int32, "float": FLOATS[0], "half": FLOATS[1]}
    return steps, params, floats.get(name, dtype)
