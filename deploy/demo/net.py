"""The demo's net: 32 convolutions of 5×5, ReLU, max-pool, fully connected, softmax, for 3×28×28 images.

`shoal model push mnist@1 deploy/demo/net.py:build --weights …` loads this file on the pusher's own machine.
"""

from __future__ import annotations

import torch
from torch import nn


class DigitNet(nn.Module):
    """Classifies digits.

    Takes (N, 3, 28, 28) float32 from 0 to 1; gives (N, 10) float32 probabilities.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 32, kernel_size=5)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(32 * 12 * 12, 10)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores before softmax: what cross-entropy takes."""
        features: torch.Tensor = self.pool(torch.relu(self.convolution(x)))
        scores: torch.Tensor = self.classifier(features.flatten(1))
        return scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Probabilities."""
        return torch.softmax(self.logits(x), dim=1)


def build() -> nn.Module:
    """A fresh net; `shoal model push` fills in the weights."""
    return DigitNet()
