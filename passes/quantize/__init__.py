"""GRAPH to FAKE_QUANT: where quantizers stand, on which grid, and which layers stay float."""

from __future__ import annotations

from pqk.passes.quantize.quantize import Quantize

__all__ = ["Quantize"]
