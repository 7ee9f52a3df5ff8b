"""Nets that benchmarks train, for 32×32×3: ResNet-18 (He et al., 2015) and MobileNetV2 (Sandler et al., 2018)."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


class Residual(nn.Module):
    """Two 3×3 convolutions beside a short cut."""

    def __init__(self, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(taken, given, 3, stride, 1, bias=False),
            nn.BatchNorm2d(given),
            nn.ReLU(),
            nn.Conv2d(given, given, 3, 1, 1, bias=False),
            nn.BatchNorm2d(given),
        )
        self.short = (
            nn.Sequential(nn.Conv2d(taken, given, 1, stride, bias=False), nn.BatchNorm2d(given))
            if stride != 1 or taken != given
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """Expand, filter each channel, project; with a short cut where shapes agree."""

    def __init__(self, taken: int, given: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = taken * expand
        widen = [nn.Conv2d(taken, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()] if expand != 1 else []
        self.body = nn.Sequential(
            *widen,
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, given, 1, bias=False),
            nn.BatchNorm2d(given),
        )
        self.adds = stride == 1 and taken == given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return x + y if self.adds else y


def resnet18(classes: int = 10) -> nn.Module:
    """11 million weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    taken = 64
    for given, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(taken, given, stride), Residual(given, given, 1)]
        taken = given
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def mobilenet_v2(classes: int = 10) -> nn.Module:
    """2.2 million weights; strides as is usual for 32×32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    taken = 32
    plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, given, repeats, stride in plan:
        for number in range(repeats):
            layers.append(Inverted(taken, given, stride if number == 0 else 1, expand))
            taken = given
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


def train(net: nn.Module, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], *, epochs: int, seconds: float) -> None:
    """SGD with momentum and a rate that falls to zero; ends early when the time is over."""
    torch.manual_seed(0)
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    deadline = time.monotonic() + seconds
    net.train()
    for step in range(steps):
        if step * 64 % len(x) < 64:
            order = torch.randperm(len(x))
        rows = order[(step * 64) % (len(x) - 63) :][:64]
        loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if time.monotonic() > deadline:
            break
    net.eval()
