"""Low rank: large linear and convolution layers as two smaller ones, by what it costs on data and what it saves."""

from __future__ import annotations

from pqk.passes.factorize.factorize import Factorize

__all__ = ["Factorize"]
