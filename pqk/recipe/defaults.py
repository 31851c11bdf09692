"""The passes of a compile whose user names none."""

from __future__ import annotations

DEFAULT_PTQ = """
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
[[pass]]
name = "convert"
"""


DEFAULT = """
[[pass]]
name = "prune"
latency_ratio = 3.0
best_effort = true
batch_norm_batches = 16
[[pass]]
name = "distill"
epochs = 10
clip = 1.0
keep = "metric"
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
[[pass]]
name = "distill"
epochs = 2
learning_rate = 0.001
clip = 1.0
teach_from = 0.1
keep = "metric"
terms = [{ term = "cross_entropy", weight = 0.1 }, { term = "kl", weight = 0.9, temperature = 2.0 }]
[[pass]]
name = "convert"
"""


FUSE = """
[[pass]]
name = "fuse"
"""
