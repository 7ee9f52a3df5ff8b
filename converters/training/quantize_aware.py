"""Quantization-aware fine-tuning: weights learn to live on a grid of 8-bit integers.

Jacob et al. 2018, arXiv:1712.05877. Weights are rounded per output channel and the inputs of layers per tensor;
gradients pass straight through the rounding (Bengio et al. 2013, arXiv:1308.3432). Batch normalization is folded into
convolutions first, as runtimes do. What comes out is a plain floating-point net whose weights lie on their grids: the
usual static recipe turns it into integers, with the same scales, in the form that runs fast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converters.training.fit import copied, error, fit
from converters.training.prune import Trained
from converters.training.record import Parameter

RATE = 0.1  # of the learning rate of other passes: the net has only to settle
KEPT = 0.95  # of a range's past, at each batch


def quantize_aware(net: Any, teacher: Any, trained: Trained, found: dict[str, Parameter]) -> Any:
    """Fine-tune a copy of a net so that rounding to 8 bits costs it less.

    Args:
        net: stays as it is.
        teacher: whose answers it learns.
        trained: what to train on.
        found: gets how many layers were rounded, and what rounding costs before and after.
    """
    folded = _folded(net)
    before = copied(folded)
    rounded = _rounding(before)
    _settle(before, trained)
    cost_before = error(before, trained.held_back)
    _rounding(folded)
    _settle(folded, trained)
    how = replace(trained.how, rate=trained.how.rate * RATE, bfloat16=False)  # coarser than the grid to settle on
    fit(folded, trained.rows, how, teacher=teacher, say=trained.say, name="quantization-aware")
    cost_after = error(folded, trained.held_back)
    _plain(folded)
    found.update(layers=rounded, error_rounded_before=round(cost_before, 3), error_rounded_after=round(cost_after, 3))
    return folded.eval()


def _folded(net: Any) -> Any:
    """A copy with batch normalization inside its convolutions; a plain copy where the net can't be followed."""
    from torch.fx.experimental.optimization import fuse

    other = copied(net).eval()
    try:
        return fuse(other)
    except Exception:  # noqa: BLE001 (control flow that depends on data, and whatever else fx can't follow)
        return other


def _rounding(net: Any) -> int:
    """Let every convolution and matrix round its weights and inputs; returns how many there are."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.utils import parametrize

    weights, inputs = _modules()
    found = 0
    for module in list(net.modules()):
        if isinstance(module, (_ConvNd, nn.Linear)):
            axis = 1 if getattr(module, "transposed", False) else 0
            parametrize.register_parametrization(module, "weight", weights(axis))
            watcher = inputs()
            module.add_module("shoal_input", watcher)
            module.register_forward_pre_hook(lambda module, given: (module.shoal_input(given[0]), *given[1:]))
            found += 1
    return found


def _settle(net: Any, trained: Trained) -> None:
    """Show the net some rows, so that ranges are there before the first step."""
    import torch

    from converters.training.fit import tensors

    for module in net.modules():
        if hasattr(module, "watching"):
            module.watching = True
    with torch.no_grad():
        for number, batch in enumerate(trained.rows.batches(trained.how.batch)):
            if number == 8:
                break
            net(*tensors(batch))
    for module in net.modules():
        if hasattr(module, "watching"):
            module.watching = False


def _plain(net: Any) -> None:
    """Bake the rounded weights in, and take the rest off."""
    from torch.nn.utils import parametrize

    for module in list(net.modules()):
        if hasattr(module, "shoal_input"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module._forward_pre_hooks.clear()  # noqa: SLF001 (the hook was put there by this file)
            del module.shoal_input


def _modules() -> tuple[Any, Any]:
    import torch
    from torch import nn

    class RoundedWeight(nn.Module):  # type: ignore[misc]
        """Symmetric, one scale an output channel."""

        def __init__(self, axis: int) -> None:
            super().__init__()
            self.axis = axis

        def forward(self, weight: Any) -> Any:
            others = [axis for axis in range(weight.ndim) if axis != self.axis]
            scale = weight.detach().abs().amax(others).clamp_min(1e-8) / 127
            zero = torch.zeros_like(scale, dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -127, 127)

    class RoundedInput(nn.Module):  # type: ignore[misc]
        """Unsigned, one scale; the range is a running mean of what training batches had."""

        low: Any
        high: Any

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.zeros(()))
            self.register_buffer("high", torch.zeros(()))
            self.watching = False

        def forward(self, given: Any) -> Any:
            if self.watching or self.training:
                low, high = given.detach().min().clamp_max(0), given.detach().max().clamp_min(0)
                fresh = bool(self.high == self.low)
                self.low = low if fresh else KEPT * self.low + (1 - KEPT) * low
                self.high = high if fresh else KEPT * self.high + (1 - KEPT) * high
                if self.watching:
                    return given
            scale = ((self.high - self.low) / 255).clamp_min(1e-8)
            zero = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
            return torch.fake_quantize_per_tensor_affine(given, scale, zero, 0, 255)

    return RoundedWeight, RoundedInput
