"""Integer grids, scales and rounding: `x ≈ scale * (q - zero_point)`.

Rounding is half to even and clamping comes after the zero point is added, as ONNX QuantizeLinear defines both, so the
fake-quantized student, the INT8 graph and the runtime compute the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Grid:
    """The integers a kernel accepts: `qmin ≤ q ≤ qmax` stored as `dtype`. Symmetric grids have zero point 0."""

    dtype: Literal["uint8", "int8"]
    qmin: int
    qmax: int
    symmetric: bool
