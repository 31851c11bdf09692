"""The fake-quantizers that a FAKE_QUANT student trains through: what the runtime will round, rounded in training.

Every quantizer has a `mode`:

    on       rounds onto its grid; the step is learned unless the scale is frozen (`requires_grad` False)
    off      the float network: a folded ReLU still clamps, nothing is rounded
    observe  as off, and a sample of the values is kept for `calibrate`

An activation that ended in ReLU or ReLU6 has no activation node any more: the quantizer's own clamp is that function
(its grid starts at 0), which saves a pass over memory in training and an operator in the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.quant.autograd import DynamicStep, LearnedStep, LearnedStepPerChannel, StraightThroughBias
from pqk.quant.qparams import BIAS_LEVELS, TINY, Grid, Method, QParams, choose, from_range

Mode = Literal["on", "off", "observe"]

SAMPLE = 1 << 18
"""values that an observing quantizer keeps, at most"""


class ActivationFakeQuant(nn.Module):
    """Per-tensor fake-quantizer of an activation. `scale` is a float32 [] parameter, `zero_point` an int32 [] buffer.

    `low` and `high` are the bounds of an activation function folded into the clamp (0 and None: ReLU; 0 and 6: ReLU6).
    The result is multiplied by `gain`: the integers stay, their scale is `output_scale`.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(
        self, grid: Grid, low: float | None = None, high: float | None = None, gain: float = 1.0, learned: bool = True
    ) -> None:
        super().__init__()
        if grid.symmetric and low is not None and low >= 0:
            grid = Grid(grid.dtype, 0, grid.qmax, symmetric=True)
        self.grid, self.low, self.high, self.gain = grid, low, high, gain
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learned)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.mode: Mode = "on"
        self.samples: list[Tensor] = []
        self.stride = 1
        self.extent: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "on":
            zero_point = int(self.zero_point)
            low, high = self.grid.qmin - zero_point, self.grid.qmax - zero_point
            return LearnedStep.apply(x, self.scale, low, high, self.limit(zero_point), self.gain)
        if self.low is not None or self.high is not None:
            x = x.clamp(self.low, self.high)
        if self.mode == "observe":
            self._observe(x.detach())
        return x if self.gain == 1 else x * self.gain

    def limit(self, zero_point: int) -> float:
        """The largest scale at which the grid stays within the folded activation's bounds."""
        limit = math.inf
        if self.high is not None and self.grid.qmax > zero_point:
            limit = self.high / (self.grid.qmax - zero_point)
        if self.low is not None and self.low < 0 and self.grid.qmin < zero_point:
            limit = min(limit, self.low / (self.grid.qmin - zero_point))
        return limit

    def _observe(self, x: Tensor) -> None:
        flat = x.flatten()
        low, high = torch.aminmax(flat)
        if self.extent is not None:
            low, high = torch.minimum(low, self.extent[0]), torch.maximum(high, self.extent[1])
        self.extent = (low, high)
        self.samples.append(flat[:: self.stride].clone())
        while sum(map(len, self.samples)) > SAMPLE:
            # strides stay odd, which does not lock onto one channel or column
            self.samples = [torch.cat(self.samples)[::3]]
            self.stride *= 3

    def calibrate(self, method: Method, percentile: float) -> None:
        """Set scale and zero point from what was observed, which is then forgotten, and turn the quantizer on."""
        if self.extent is None:
            raise InputError(
                "quantize: a quantizer was calibrated before any batch was seen; is the validation data empty?"
            )
        if method == "minmax":
            qparams = from_range(*self.extent, self.grid)
        else:
            qparams = choose(torch.cat([*self.samples, torch.stack(self.extent)]), self.grid, method, None, percentile)
        with torch.no_grad():
            self.zero_point.copy_(qparams.zero_point)
            self.scale.copy_(qparams.scale.clamp(max=self.limit(int(qparams.zero_point))))
        self.samples, self.stride, self.extent, self.mode = [], 1, None, "on"

    def qparams(self) -> QParams:
        """What rounds: the scale as it is used, within its bounds."""
        scale = self.scale.detach().clamp(TINY, self.limit(int(self.zero_point)))
        return QParams(scale, self.zero_point, self.grid)

    def output_scale(self) -> Tensor:
        """float32 []: the scale of the integers as others read them."""
        return self.qparams().scale * self.gain

    def extra_repr(self) -> str:
        return f"{self.grid.dtype} [{self.grid.qmin}, {self.grid.qmax}], mode={self.mode}"


class CacheFakeQuant(ActivationFakeQuant):
    """Per-tensor fake-quantizer of keys or values as they are kept for the tokens that follow.

    Nobody else multiplies its integers: products with what is kept are of floats.
    """


class DynamicFakeQuant(nn.Module):
    """Per-tensor fake-quantizer on the range of the values at hand, which the runtime finds anew for every tensor.

    Nothing is calibrated or learned, and nothing is clipped, so the gradient passes as it is. A range is that of a
    whole batch: what a sample's neighbours are moves its rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode: Mode = "on"

    def forward(self, x: Tensor) -> Tensor:
        return DynamicStep.apply(x) if self.mode == "on" else x

    def extra_repr(self) -> str:
        return f"mode={self.mode}"


class WeightFakeQuant(nn.Module):
    """Per-output-channel symmetric fake-quantizer of a weight [C, …]. `scale` is a float32 [C] parameter."""

    def __init__(self, grid: Grid, channels: int, learned: bool = True) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.ones(channels), requires_grad=learned)
        self.mode: Mode = "on"

    def forward(self, weight: Tensor) -> Tensor:
        if self.mode == "on":
            return LearnedStepPerChannel.apply(weight, self.scale, self.grid.qmin, self.grid.qmax)
        return weight

    def calibrate(self, weight: Tensor, method: Method, percentile: float) -> None:
        """Set the scales from the weight's values and turn the quantizer on."""
        qparams = choose(weight, self.grid, method, axis=0, percentile=percentile)
        with torch.no_grad():
            self.scale.copy_(qparams.scale)
        self.mode = "on"

    def qparams(self) -> QParams:
        zero = torch.zeros(self.scale.shape, dtype=torch.int32, device=self.scale.device)
        return QParams(self.scale.detach().clamp(min=TINY), zero, self.grid, axis=0)

    def extra_repr(self) -> str:
        return f"{self.grid.dtype} [{self.grid.qmin}, {self.grid.qmax}], channels={len(self.scale)}, mode={self.mode}"


class BiasFakeQuant(nn.Module):
    """Rounds a bias [C] to the int32 grid of its accumulator, scale `s_x * s_w`; the gradient passes straight through.

    The two quantizers that own `s_x` and `s_w` are borrowed: they are not submodules, so no tensor is saved twice.
    """

    def __init__(self, activation: ActivationFakeQuant, weight: WeightFakeQuant) -> None:
        super().__init__()
        self._borrowed = (activation, weight)

    @property
    def mode(self) -> Mode:
        return self._borrowed[1].mode

    def forward(self, bias: Tensor) -> Tensor:
        if self.mode != "on":
            return bias
        return StraightThroughBias.apply(bias, self.scale())

    @property
    def grid(self) -> Grid:
        return self._borrowed[1].grid

    def scale(self) -> Tensor:
        """float32 [C]: the step of the accumulator."""
        activation, weight = self._borrowed
        return activation.output_scale() * weight.qparams().scale

    def fit(self, bias: Tensor) -> None:
        """Widen the weight scales of channels so quiet that int32 could not hold their bias."""
        activation, weight = self._borrowed
        with torch.no_grad():
            needed = bias.abs() / (BIAS_LEVELS * activation.output_scale())
            weight.scale.copy_(torch.maximum(weight.scale, needed))


Quantizer = ActivationFakeQuant | WeightFakeQuant


def quantizers(student: nn.Module) -> dict[str, Quantizer]:
    """The activation and weight quantizers of a FAKE_QUANT student by module path, in graph order."""
    return {n: m for n, m in student.named_modules() if isinstance(m, ActivationFakeQuant | WeightFakeQuant)}


def set_mode(student: nn.Module, mode: Mode) -> None:
    """Switch every quantizer of a FAKE_QUANT student."""
    for module in student.modules():
        if isinstance(module, ActivationFakeQuant | DynamicFakeQuant | WeightFakeQuant):
            module.mode = mode


@contextmanager
def bounded_steps(student: nn.Module, share: float) -> Iterator[None]:
    """Whatever moves the step sizes within moves none by more than a factor of `1 + share`; so they stay positive.

    LSQ scales a step's gradient so that it moves, relative to its size, about as much as the layer's weights do (Esser
    et al. 2020, arXiv:1902.08153, section 2.2). That holds for the median channel, not for each: of weights with batch
    norm folded in, the median scale moved by 0.001 of itself in a step at a rate of 0.003 and one by 0.6; at 0.01 one
    moved by 3000 times itself. A relative bound is one in the log domain, independent of the scale, which is where
    Jain et al. 2020 ("Trained Quantization Thresholds", arXiv:1903.08066) learn their thresholds.
    """
    moving = [q.scale for q in quantizers(student).values() if q.scale.requires_grad]
    before = [scale.detach().clone() for scale in moving]
    yield
    with torch.no_grad():
        for scale, old in zip(moving, before, strict=True):
            scale.clamp_(old / (1 + share), old * (1 + share))


def freeze_scales(student: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) learning the step sizes; the weights go on training on a grid that no longer moves."""
    for quantizer in quantizers(student).values():
        quantizer.scale.requires_grad_(not frozen)
