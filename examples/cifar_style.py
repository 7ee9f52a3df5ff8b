"""From a net to a fleet: digits on photographs, 32×32×3, two epochs. Run it with `make example`."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.pictures import Rows, response_ms, scores, tensors
from fleet_server.sdk import Shoal

EPOCHS = 2


def build() -> nn.Module:
    """Two convolutions of 6 and 16 channels, and three linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def main(rows: tuple[Rows, Rows, Rows], folder: str = ".shoal-local") -> dict[str, float]:
    """Train, optimize, deploy and predict; gives what it printed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    (x, y), held_out, (test_x, test_y) = rows
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    net, criterion = build(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(EPOCHS):
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(net(images), labels).backward()
            optimizer.step()

    with Shoal.local(folder) as shoal:
        model = shoal.compile(net, optimizer, criterion, example_inputs=x[:2], train=loader, evaluate=held_out)
        model.optimize(name="cifar-net", prune=0.7, quantize=True)
        deployment = model.deploy(target="accelerator==cuda", fallback="cpu")
        outputs = model.predict(test_x)
        print(model, *model.chosen.tried, deployment, model.answered, sep="\n")
        (variant,) = model.measured()

    found = scores(outputs.argmax(1), test_y)
    print("unoptimized:", scores(net.eval()(test_x).argmax(1), test_y))
    print("on the fleet:", found)
    here, there = response_ms(net, test_x), variant["latency_p50_ms"]
    print(f"one image: {there:.3f} ms on {variant['on']}, {here:.3f} ms unoptimized here: {there / here:.2f}×")
    return {**found, "response_ratio": there / here}


if __name__ == "__main__":
    main(tensors(50_000, 10_000))
