"""Which channels of a net hang together, how much work they are, and their removal, by torch-pruning's graph.

Fang et al. 2023, "DepGraph: Towards any structural pruning", arXiv:2301.12900. A group is left alone when the net can't
do without any of its channels (it gives the output, or a reshape fixes their number): that is tried, not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from converters.errors import ConversionError
from converters.training.allocate import LEAST_CHANNELS, Layer, kept
from converters.training.data import Rows
from converters.training.fit import Fitting, copied, first, loss_of, tensors

TAYLOR_BATCHES = 8


@dataclass(frozen=True)
class Group:
    """Channels that can only go together.

    Attributes:
        root: name of the layer that gives them.
        channels: how many there are.
        members: names of all layers that lose channels with it.
    """

    root: str
    channels: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What can be removed of a net.

    Attributes:
        groups: by root.
        layers: work of each convolution and matrix.
        left_alone: why a layer's channels all stay, by its name.
    """

    groups: dict[str, Group]
    layers: tuple[Layer, ...]
    left_alone: dict[str, str] = field(default_factory=dict)


def analyse(net: Any, rows: Rows) -> Structure:
    """Find the groups of a net's channels, on two example rows.

    Raises:
        ConversionError: `not_prunable`, when the net can't be followed, or nothing can be removed.
    """
    examples = tensors(rows.first(2))
    graph = _graph(net, examples)
    names = {module: name for name, module in net.named_modules()}
    macs = _macs(net, examples)
    groups: dict[str, Group] = {}
    left: dict[str, str] = {}
    gives: dict[str, str] = {}
    takes: dict[str, str] = {}
    for found in graph.get_all_groups(root_module_types=_roots()):
        root = names.get(found[0][0].target.module)
        if root is None:
            continue
        reason = _reason(net, root, found, graph, examples)
        if reason is not None:
            left[root] = reason
            continue
        members = []
        for dependency, _ in found:
            name = names.get(dependency.target.module)
            if name is None:
                continue
            members.append(name)
            if name not in macs:
                continue
            if graph.is_out_channel_pruning_fn(dependency.handler):
                gives[name] = root
            else:
                takes[name] = root
        channels = graph.get_out_channels(found[0][0].target.module)
        groups[root] = Group(root, channels, tuple(dict.fromkeys(members)))
    weights = {name: float(module.weight.numel()) for module, name in names.items() if name in macs}
    layers = tuple(Layer(value, gives.get(name), takes.get(name), weights[name]) for name, value in macs.items())
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise ConversionError(
            "not_prunable", f"no channel of this net can be removed ({reasons or 'no layer has any'})"
        )
    return Structure(groups, layers, left)


def remove(net: Any, structure: Structure, ratios: Mapping[str, float], rows: Rows, seed: int = 0) -> dict[str, int]:
    """Remove a ratio of each group's channels, the least important first; in place.

    Importance is Taylor's of first order, summed over a group (Molchanov et al. 2019, arXiv:1906.10771): gradients come
    from training rows. Numbers of channels that stay are multiples of 8 or 16 where there are enough.

    Returns:
        How many channels are left, by group.
    """
    import torch_pruning

    _gradients(net, rows, seed)
    graph = _graph(net, tensors(rows.first(2)))
    modules = dict(net.named_modules())
    importance = torch_pruning.importance.GroupTaylorImportance()
    left = {}
    for root in structure.groups:
        module = modules[root]
        channels = graph.get_out_channels(module)
        keep = kept(structure.groups[root].channels, ratios.get(root, 0.0))
        left[root] = min(keep, channels)
        if keep >= channels:
            continue
        function = graph.get_pruner_of_module(module).prune_out_channels
        whole = graph.get_pruning_group(module, function, list(range(channels)))
        scores = importance(whole)
        if scores is None:
            left[root] = channels
            continue
        indices = scores.argsort()[: channels - keep].tolist()
        group = graph.get_pruning_group(module, function, indices)
        if graph.check_pruning_group(group):
            group.prune()
        else:
            left[root] = channels
    net.zero_grad(set_to_none=True)
    return left


@contextmanager
def without(net: Any, graph: Any, root: str, ratio: float, importance: Any) -> Iterator[None]:
    """The net as if a ratio of one group's channels were gone: who takes them is blind to them. Undone at the end."""
    import torch

    module = dict(net.named_modules())[root]
    channels = graph.get_out_channels(module)
    function = graph.get_pruner_of_module(module).prune_out_channels
    scores = importance(graph.get_pruning_group(module, function, list(range(channels))))
    gone = scores.argsort()[: channels - kept(channels, ratio)].tolist()
    saved = []
    with torch.no_grad():
        for dependency, indices in graph.get_pruning_group(module, function, gone) if gone else ():
            target = dependency.target.module
            weight = getattr(target, "weight", None)
            if weight is None or weight.ndim < 2 or graph.is_out_channel_pruning_fn(dependency.handler):
                continue
            axis = 0 if getattr(target, "transposed", False) else 1
            saved.append((weight, weight.detach().clone()))
            weight.index_fill_(axis, torch.tensor(list(indices)), 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in reversed(saved):
                weight.copy_(before)


def prepared(net: Any, rows: Rows, seed: int = 0) -> tuple[Any, Any]:
    """A dependency graph and an importance with gradients in place, for `without`."""
    import torch_pruning

    _gradients(net, rows, seed)
    return _graph(net, tensors(rows.first(2))), torch_pruning.importance.GroupTaylorImportance()


def count(net: Any, rows: Rows) -> tuple[float, int]:
    """Multiply-accumulates of one row in convolutions and matrices, and parameters."""
    return sum(_macs(net, tensors(rows.first(2))).values()), sum(one.numel() for one in net.parameters())


def _roots() -> list[Any]:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return [_ConvNd, nn.Linear]


def _graph(net: Any, examples: tuple[Any, ...]) -> Any:
    import torch_pruning

    net.eval()
    for one in net.parameters():
        one.requires_grad_(True)
    try:
        return torch_pruning.DependencyGraph().build_dependency(net, example_inputs=examples, verbose=False)
    except Exception as error:
        detail = f"this net can't be followed from layer to layer ({type(error).__name__}: {str(error)[:200]})"
        raise ConversionError("not_prunable", detail) from error


def _reason(net: Any, root: str, group: Any, graph: Any, examples: tuple[Any, ...]) -> str | None:
    """Why a group must stay whole; None when it need not: some of its channels are removed from a copy that is run."""
    import torch

    modules = dict(net.named_modules())
    channels = graph.get_out_channels(modules[root])
    if channels < 2 * LEAST_CHANNELS:
        return "it has few channels"
    for dependency, _ in group:
        target = dependency.target.module
        parts = getattr(target, "groups", 1)
        if parts not in {1, getattr(target, "in_channels", 1)} or type(target).__name__ in {"LSTM", "GRU", "RNN"}:
            return f"it meets a {type(target).__name__} in parts, which must stay equal"
    other = copied(net)
    with torch.inference_mode():
        before = first(net(*examples)).shape
    try:
        own = _graph(other, examples)
        module = dict(other.named_modules())[root]
        gone = channels - kept(channels, 0.5)
        function = own.get_pruner_of_module(module).prune_out_channels
        pruned = own.get_pruning_group(module, function, list(range(gone)))
        if not own.check_pruning_group(pruned):
            return "a layer would lose all its channels"
        pruned.prune()
        with torch.inference_mode():
            after = first(other(*examples)).shape
    except Exception:  # noqa: BLE001 (a net may do anything with a number of channels)
        return "the net needs their exact number"
    return None if after == before else "they are the net's answer"


def _macs(net: Any, examples: tuple[Any, ...]) -> dict[str, float]:
    import torch

    found: dict[str, float] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: Any, _inputs: Any, output: Any) -> None:
            positions = output[0].numel() / (output.shape[1] if module.weight.ndim > 2 else output.shape[-1])
            weights = math.prod(module.weight.shape)
            found[name] = found.get(name, 0.0) + float(weights * positions)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, tuple(_roots())):
            hooks.append(cast(Any, module).register_forward_hook(watch(name)))
    try:
        with torch.inference_mode():
            net.eval()(*examples)
    finally:
        for one in hooks:
            one.remove()
    return found


def _gradients(net: Any, rows: Rows, seed: int) -> None:
    """Gradients of the loss over a few batches, left in the parameters."""
    import numpy as np
    import torch

    net.eval()
    for one in net.parameters():
        one.requires_grad_(True)
    net.zero_grad(set_to_none=True)
    rng = np.random.default_rng(seed)
    with torch.enable_grad():
        for number, batch in enumerate(rows.batches(64, rng)):
            if number == TAYLOR_BATCHES:
                break
            loss_of(net, batch, Fitting(), None, rng).backward()
