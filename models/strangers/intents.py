"""A text encoder with pre-norm blocks, learned positions, GELU and the mean over all places, masked by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pqk.models.strangers.stranger import Samples, Stranger
from pqk.models.strangers.words import PAD, word_samples

WORDS, LENGTH = 2000, 24


class TextBlock(nn.Module):
    """Attention written out, and two linear layers: states [B, T, D] and a mask [B, 1, 1, T] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU(approximate="tanh")
        self.drop = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, heads, T, D / heads]."""
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.split(self.query(h)), self.split(self.key(h)), self.split(self.value(h))
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.scale + mask, dim=-1)
        x = x + self.drop(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(self.gelu(self.up(self.norm2(x)))))


class Intents(nn.Module):
    """Two blocks of width 128: word ids [B, 24] -> logits [B, 77]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(TextBlock(width, 4) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 77)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids == PAD)[:, None, None, :] * -1e4
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x).mean(dim=1))


def questions(data: Path | None) -> Samples:
    """Banking77."""
    return word_samples("banking77", data, WORDS, LENGTH)


INTENTS = Stranger(
    "intents", "text encoder written out, GELU, learned positions, 77 classes; Banking77", Intents, questions,
    epochs=10, rate=2e-3,
)  # fmt: skip
