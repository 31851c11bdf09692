"""A text encoder of torch's own layers, with sinusoidal positions, padding mask and the mean of what is no padding."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pqk.models.strangers.stranger import Samples, Stranger
from pqk.models.strangers.words import PAD, word_samples

WORDS, LENGTH = 6000, 40


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of geometric wavelengths, [length, width] (Vaswani et al. 2017, section 3.5)."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class Sentiment(nn.Module):
    """Three post-norm layers of width 128 with ReLU: word ids [B, 40] -> logits [B, 2]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.register_buffer("positions", 0.1 * sinusoids(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 256, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == PAD
        states = self.encoder(self.embedding(ids) + self.positions, src_key_padding_mask=padding)
        words = (~padding).unsqueeze(-1).float()
        return self.head((states * words).sum(1) / words.sum(1).clamp(min=1.0))


def sentences(data: Path | None) -> Samples:
    """SST-2."""
    return word_samples("sst2", data, WORDS, LENGTH)


SENTIMENT = Stranger(
    "sentiment", "nn.TransformerEncoder, 3 layers, padding mask; SST-2", Sentiment, sentences, epochs=6, rate=1e-3
)
