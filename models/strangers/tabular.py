"""A tabular MLP on rows of numbers and categories that a stated formula labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pqk.models.strangers.stranger import Samples, Stranger

ROWS, TEST = 24_000, 4_000
NUMBERS, CATEGORIES = 12, (8, 5, 12)


class Tabular(nn.Module):
    """Three hidden layers of 256, 192 and 128 units: rows [B, 37] -> logits [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(NUMBERS + sum(CATEGORIES), 256), nn.BatchNorm1d(256), nn.SiLU(), nn.Dropout(0.1),
            nn.Linear(256, 192), nn.BatchNorm1d(192), nn.SiLU(), nn.Dropout(0.1),
            nn.Linear(192, 128), nn.SiLU(),
            nn.Linear(128, 4),
        )  # fmt: skip

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def rows(data: Path | None = None) -> Samples:
    """Rows float32 [N, 37]: 12 numbers, and three categories as ones and zeros; no file is read.

    Half of the numbers are normal, a quarter log-normal and a quarter within 0 and 1. The label is the largest of four
    scores: a linear one of all features, `sin(2 x0) + x1 x2`, `log(1 + x6) - |x3| + c`, c by the first category, and
    `2 x9 x10 + x4 [second category is 0]`, each in units of its own deviation and with normal noise of 0.2.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, NUMBERS))
    x[:, 6:9] = np.exp(x[:, 6:9])
    x[:, 9:] = rng.random((ROWS, 3))
    kinds = [rng.integers(0, n, ROWS) for n in CATEGORIES]
    features = np.concatenate([x, *(np.eye(n)[k] for n, k in zip(CATEGORIES, kinds, strict=True))], axis=1)
    scores = np.stack(
        [
            features @ rng.standard_normal(features.shape[1]),
            np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2],
            np.log1p(x[:, 6]) - np.abs(x[:, 3]) + rng.standard_normal(CATEGORIES[0])[kinds[0]],
            2 * x[:, 9] * x[:, 10] + x[:, 4] * (kinds[1] == 0),
        ],
        axis=1,
    )
    scores = (scores - scores.mean(0)) / scores.std(0) + 0.2 * rng.standard_normal(scores.shape)
    inputs = torch.from_numpy(features.astype(np.float32))
    labels = torch.from_numpy(scores.argmax(1))
    return Samples((inputs[TEST:], labels[TEST:]), (inputs[:TEST], labels[:TEST]))


TABULAR = Stranger(
    "tabular", "MLP, 37 features of numbers and categories; a formula", Tabular, rows, epochs=15, rate=4e-3,
    batch_size=256,
)  # fmt: skip
