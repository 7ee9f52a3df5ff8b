"""Train the demo's net on MNIST: cross-entropy, SGD with a falling rate, at most two minutes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from deploy.demo.data import to_images
from deploy.demo.net import DigitNet

BATCH = 128
EPOCHS = 4
LIMIT_S = 120.0


def train(data: dict[str, np.ndarray], weights: Path) -> float:
    """Train, and write the weights as safetensors.

    Args:
        data: as `deploy.demo.data.load_mnist` gives it; the training part is used, the validation part measures.
        weights: the file to write.

    Returns:
        Accuracy on the validation part, 0 to 1.
    """
    torch.manual_seed(7)
    started = time.monotonic()
    net = DigitNet()
    images, labels = torch.from_numpy(data["train_x"]), torch.from_numpy(data["train_y"])
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    loss_of = nn.CrossEntropyLoss()
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            if time.monotonic() - started > LIMIT_S:
                break
            rows = torch.randint(len(images), (BATCH,))
            batch = (images[rows].float() / 255)[:, None].expand(-1, 3, -1, -1)
            optimizer.zero_grad()
            loss = loss_of(net.logits(batch), labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    save_file(net.state_dict(), str(weights))
    return _accuracy(net, data["valid_x"], data["valid_y"])


def break_weights(weights: Path, broken: Path) -> None:
    """Write weights of the right names and shapes whose numbers are shuffled: the right format, a wrong model."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(11)
    tensors = load_file(str(weights))
    shuffled = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(shuffled, str(broken))


def _accuracy(net: nn.Module, gray: np.ndarray, labels: np.ndarray) -> float:
    net.eval()
    with torch.inference_mode():
        answers = [net(torch.from_numpy(to_images(part))).argmax(1).numpy() for part in np.array_split(gray, 20)]
    return float((np.concatenate(answers) == labels).mean())
