"""The recipe of the toy (`toy.py`), whole and without what it compiles."""

from __future__ import annotations

SOURCES = """
[teacher]
factory = "toy:teacher"
weights = "toy.safetensors"
[task]
factory = "toy:task"
"""
PASSES = """
[target]
name = "x86-avx2"
[[pass]]
name = "prune"
macs_ratio = 1.5
multiple = 8
[[pass]]
name = "distill"
epochs = 1
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
samples = 64
[[pass]]
name = "convert"
"""
RECIPE = SOURCES + PASSES
