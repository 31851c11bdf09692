"""A small CNN of the kind that tutorials begin with: biases, no batch norm, max pooling, images from 0 to 255."""

from __future__ import annotations

from torch import Tensor, nn

from pqk.models.strangers.pictures import raw
from pqk.models.strangers.stranger import Stranger


class PlainCNN(nn.Module):
    """Three convolutions and two linear layers: images [B, 3, 32, 32] of 0 to 255 -> logits [B, 10]; 8.1 M MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.3)
        self.fc1 = nn.Linear(64 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x / 255.0
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        x = self.pool(self.conv3(x).relu())
        x = self.drop(self.fc1(x.flatten(1)).relu())
        return self.fc2(x)


PLAIN_CNN = Stranger(
    "plain_cnn", "CNN with biases, no batch norm, inputs 0 to 255; CIFAR-10", PlainCNN, raw, epochs=10, rate=2e-3
)
