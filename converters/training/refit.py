"""Weights of a pruned net, and a fresh net made to fit them.

Pruning changes shapes; the code that builds the net does not know that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = {"shoal": "pruned"}


def save_weights(net: Any, path: Path) -> None:
    """Write a net's weights as safetensors that `net.py:build` fits itself to when it is loaded by Shoal."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().clone().contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, str(path), metadata=MARK)


def is_marked(path: Path) -> bool:
    """Whether weights were written by `save_weights`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return (file.metadata() or {}).get("shoal") == MARK["shoal"]


def refit(net: Any, state: Mapping[str, Any]) -> None:
    """Give layers of a fresh net the shapes of a pruned one's weights; in place, before `load_state_dict`."""
    from torch import nn

    for name, module in net.named_modules():
        weight = state.get(f"{name}.weight" if name else "weight")
        if weight is None or not hasattr(module, "weight") or module.weight is None:
            continue
        if tuple(weight.shape) == tuple(module.weight.shape):
            continue
        _describe(module, weight)
        for kind in ("weight", "bias"):
            given = state.get(f"{name}.{kind}")
            if given is not None and getattr(module, kind, None) is not None:
                setattr(module, kind, nn.Parameter(given.clone()))
        for kind in ("running_mean", "running_var"):
            given = state.get(f"{name}.{kind}")
            if given is not None and getattr(module, kind, None) is not None:
                setattr(module, kind, given.clone())


def _describe(module: Any, weight: Any) -> None:
    """Let a layer's own numbers say what its weights are."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, _ConvNd):
        depthwise = module.groups == module.in_channels and module.groups > 1
        module.groups = weight.shape[0] if depthwise else module.groups
        module.in_channels, module.out_channels = weight.shape[1] * module.groups, weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _BatchNorm):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
