"""Unstructured pruning: the smallest weights become zero, wherever they are (Han et al. 2015, arXiv:1506.02626).

The net keeps its shapes, so it is no faster on the runtimes that devices have, and its file is no smaller; what shrinks
is the file compressed, as it travels.
"""

from __future__ import annotations

from typing import Any

from converters.errors import ConversionError
from converters.training.fit import copied, error, fit
from converters.training.prune import Trained
from converters.training.record import Parameter


def sparsify(net: Any, sparsity: float, trained: Trained, found: dict[str, Parameter]) -> Any:
    """A net with a share of zeros in its convolutions and matrices, fine-tuned so that they stay zero.

    Args:
        net: stays as it is.
        sparsity: share of zeros, 0 to 1; counted over all layers together.
        trained: what to fine-tune on.
        found: gets the sparsity that came out.

    Raises:
        ConversionError: `nothing_to_do`, for a net without such layers.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.utils import prune

    sparse = copied(net)
    weights = [(module, "weight") for module in sparse.modules() if isinstance(module, (_ConvNd, nn.Linear))]
    if not weights:
        raise ConversionError("nothing_to_do", "the net has no convolution or matrix whose weights could be zero")
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    fit(sparse, trained.rows, trained.how, teacher=net, say=trained.say, name=f"recover at {sparsity:.0%} zeros")
    for module, name in weights:
        prune.remove(module, name)
    zeros = sum(int((module.weight == 0).sum()) for module, _ in weights)
    total = sum(module.weight.numel() for module, _ in weights)
    found.update(
        sparsity=round(zeros / total, 4),
        points_lost_on_deciding_rows=round(error(sparse, trained.held_back) - error(net, trained.held_back), 3),
    )
    return sparse
