"""The short form of `make example`: the same program on pictures that are made here, for nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.cifar_style import main
from examples.pictures import Rows


def pictures(count: int, seed: int) -> Rows:
    """Noise, of which one of ten tiles is brighter."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count,), generator=random)
    x = torch.rand(count, 3, 32, 32, generator=random) * 0.5
    for row, tile in enumerate(y.tolist()):
        top, left = 16 * (tile // 5), 6 * (tile % 5)
        x[row, :, top : top + 16, left : left + 6] += 0.5
    return x, y


def test_from_a_net_to_a_fleet_and_back(tmp_path: Path) -> None:
    found = main((pictures(2000, 1), pictures(300, 2), pictures(500, 3)), str(tmp_path / "fleet"))
    assert min(found["accuracy"], found["recall"], found["f1"]) > 0.9
    assert found["response_ratio"] > 0


def test_it_is_short() -> None:
    assert len(Path(main.__code__.co_filename).read_text().splitlines()) <= 60
