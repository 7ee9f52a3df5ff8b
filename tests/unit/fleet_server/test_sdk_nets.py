"""What the SDK says of nets, rows and settings that do not fit: all of it before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fleet_server.sdk import NetError, Shoal
from fleet_server.sdk.learning import Compression, LiveNet, best


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"net": nn.Linear}, "net: type is no torch.nn.Module"),
        ({"optimizer": 3}, "optimizer: int is no torch.optim.Optimizer"),
        ({"criterion": 3}, "criterion: give a function"),
        ({"example_inputs": torch.zeros(2, 3)}, "example_inputs: the net does not take"),
        ({"example_inputs": "x"}, "example_inputs: str is neither a tensor nor an array"),
        ({"train": 3}, "train: int gives no batches"),
        ({"train": (torch.zeros(30, 3), torch.zeros(30))}, r"train: 'input' has rows of shape \[3\]"),
        ({"train": (torch.zeros(3, 4), torch.zeros(3))}, "train: it has 3 rows"),
        ({"evaluate": (torch.zeros(30, 4), torch.zeros(29))}, "evaluate: inputs and targets need the same number"),
        ({"evaluate": [(torch.zeros(30, 4),)]}, r"evaluate: a batch is \(inputs, targets\)"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    given = {"net": nn.Linear(4, 2), "example_inputs": torch.zeros(2, 4), **change}
    with pytest.raises(NetError, match=said):
        Shoal("http://127.0.0.1:1").compile(**given)


def tried(net: str, error: float | None, seconds: float, size: int) -> dict[str, Any]:
    return {"net": net, "error": error, "seconds": seconds, "bytes": size}


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([tried("pruned", 5.9, 0.5, 10)], "pruned"),
        ([tried("pruned", 6.1, 0.5, 10)], "whole"),  # it lost more than the budget
        ([tried("pruned", 5.0, 1.05, 10)], "pruned"),  # as fast, and smaller
        ([tried("pruned", 5.0, 1.2, 10)], "whole"),
        ([tried("whole-qat", 5.5, 1.0, 101)], "whole-qat"),
        ([tried("whole-qat", 9.0, 1.0, 99)], "whole"),
        ([tried("pruned", 5.5, 0.5, 10), tried("pruned-qat", 9.0, 0.5, 10)], "pruned"),
    ],
)
def test_the_fastest_within_the_budget_is_pushed_and_of_two_alike_the_smaller(
    others: list[dict[str, Any]], chosen: str
) -> None:
    nets = [tried("whole", 5.0, 1.0, 100), *others]
    assert nets[best(nets, 1.0)]["net"] == chosen


class Counted(torch.optim.SGD):
    """Tells which rates and momenta such optimizers were made with, and how often they stepped."""

    made: list[tuple[float, float]] = []  # noqa: RUF012 (all of them, on purpose)
    steps = 0

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        Counted.made.append((lr, momentum))

    def step(self, closure: Any = None) -> Any:
        Counted.steps += 1
        return super().step(closure)


def test_recovery_trains_by_the_optimizer_and_the_loss_that_were_given(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    asked = []

    def loss(answer: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(len(targets))
        return nn.functional.multi_margin_loss(answer, targets)

    x = torch.randn(200, 8)
    rows = (x, (x[:, 0] > 0).long())
    optimizer = Counted(net.parameters(), lr=0.03, momentum=0.8)
    live = LiveNet(net, optimizer, loss, example_inputs=x[:2], train=rows, evaluate=rows)
    wanted = Compression(0.5, nn.Linear(8, 2), False, 1.0, 100.0, 0)
    found = live.compressed(wanted, tmp_path, lambda _: None)
    assert [one["net"] for one in found.tried] == ["whole", "pruned-0.5", "distilled"]
    assert set(Counted.made) == {(0.03, 0.8)}
    assert len(Counted.made) > 2
    assert Counted.steps >= 3
    assert asked
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()), "the user's net stays"
    assert "loss" in live.score(found.net)
