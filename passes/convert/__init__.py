"""FAKE_QUANT to INT8: integer weights and explicit quantize / dequantize."""

from __future__ import annotations

from pqk.passes.convert.convert import Convert

__all__ = ["Convert"]
