"""What the SDK says of nets, rows and settings that do not fit: all of it before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fleet_server.sdk import NetError, Shoal


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
