"""Trains a net on rows, with or without a teacher, and says how good it is.

With a teacher: soft targets at a temperature beside cross-entropy (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).
Rows of floating-point inputs are mixed by pairs, so that the teacher can be asked about inputs that the data does not
have (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", arXiv:2106.05237). The last
part of the time goes without: normalization then settles on rows as they will come (He et al. 2019, "Data augmentation
revisited", arXiv:1909.09148).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.training.data import Rows

SCORED_AT_ONCE = 256
MIXED_UNTIL = 0.7  # of the time
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fitting:
    """How to train.

    Attributes:
        epochs: over all rows.
        rate: the highest learning rate of AdamW; it rises for a tenth of the steps, then falls to zero as a cosine.
        batch: rows a step.
        weight_decay: of AdamW.
        temperature: of the soft targets.
        soft: share of the loss that the teacher has, 0 to 1.
        seed: of order and mixing.
        seconds: when to end early; None never. The schedule is followed by what has passed, of steps or of time.
        bfloat16: whether layers multiply in bfloat16 (weights, sums and the loss stay float32); None: convolutional
            nets do, where the processor has instructions for it, which halves the time.
        optimizer: makes an optimizer of parameters, in the place of AdamW; the schedule then scales the rates of its
            groups, and `rate` and `weight_decay` do not count.
        loss: of the first output and the targets of a batch, a scalar; None: cross-entropy of classes, squares of
            numbers.
    """

    epochs: float = 5.0
    rate: float = 1e-3
    batch: int = 64
    weight_decay: float = 1e-4
    temperature: float = 4.0
    soft: float = 0.7
    seed: int = 0
    seconds: float | None = None
    bfloat16: bool | None = None
    optimizer: Callable[[list[Any]], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None


def fit(
    net: Any, rows: Rows, how: Fitting, *, teacher: Any = None, say: Say = lambda _: None, name: str = "train"
) -> int:
    """Train a net in place; it is in evaluation mode afterwards.

    Args:
        net: a torch.nn.Module.
        rows: to train on.
        how: see `Fitting`.
        teacher: a net whose answers are learnt too.
        say: told how far it is, a few times an epoch.
        name: of what is being done.

    Returns:
        Steps that were made.
    """
    import torch

    rng = np.random.default_rng(how.seed)
    total = max(1, int(how.epochs * -(-rows.count // how.batch)))
    optimizer = _optimizer(net, how)
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    if teacher is not None:
        teacher.eval()
    started, step = time.monotonic(), 0
    net.train()
    with torch.random.fork_rng(devices=[]), _fast(net, how) as arithmetic:
        torch.manual_seed(how.seed)
        while step < total:
            for batch in rows.batches(how.batch, rng):
                passed = step / total
                if how.seconds is not None:
                    passed = max(passed, (time.monotonic() - started) / how.seconds)
                if passed >= 1 or (batch.count < 2 and rows.count > 1):  # normalization needs two rows
                    step += 1
                    break
                for group, rate in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = rate * _schedule(passed)
                with arithmetic():
                    loss = loss_of(net, batch, how, teacher, rng, mix=passed < MIXED_UNTIL)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimizer.step()
                step += 1
                if step % 20 == 0 or step == total:
                    say(f"{name}: {passed:.0%}, loss {float(loss.detach()):.4f}")
                if step >= total:
                    break
            if how.seconds is not None and time.monotonic() - started >= how.seconds:
                break
    net.eval()
    return step


def _optimizer(net: Any, how: Fitting) -> Any:
    import torch

    learnt = [one for one in net.parameters() if one.requires_grad]
    if how.optimizer is not None:
        return how.optimizer(learnt)
    return torch.optim.AdamW(learnt, lr=how.rate, weight_decay=how.weight_decay)


@contextmanager
def _fast(net: Any, how: Fitting) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """The net in the memory layout that convolutions are fastest in, until the end; gives the context of a step."""
    import torch

    convolutional = any(isinstance(module, torch.nn.Conv2d) for module in net.modules())
    wanted = convolutional and _multiplies_bfloat16() if how.bfloat16 is None else how.bfloat16
    if convolutional:
        net.to(memory_format=torch.channels_last)
    try:
        yield lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted)
    finally:
        if convolutional:
            net.to(memory_format=torch.contiguous_format)


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16: without, torch imitates them slowly."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _schedule(passed: float) -> float:
    """Share of the highest learning rate when a share of the work has passed."""
    return min(1.0, passed / 0.1 + 0.05) * 0.5 * (1 + float(np.cos(np.pi * min(passed, 1.0))))


def loss_of(net: Any, batch: Rows, how: Fitting, teacher: Any, rng: np.random.Generator, *, mix: bool = False) -> Any:
    """The loss of a net on a batch, with what a teacher says of it where there is one; of mixed rows where asked."""
    import torch

    inputs = tensors(batch)
    targets = torch.from_numpy(batch.targets)
    if teacher is None:
        return _hard(first(net(*inputs)), targets, how)
    share, other = 1.0, torch.arange(batch.count)
    if mix and all(one.is_floating_point() for one in inputs):
        share, other = float(rng.uniform(0.5, 1.0)), torch.from_numpy(rng.permutation(batch.count))
        inputs = tuple(share * one + (1 - share) * one[other] for one in inputs)
    answer = first(net(*inputs))
    with torch.no_grad():
        wanted = first(teacher(*inputs))
    hard = share * _hard(answer, targets, how) + (1 - share) * _hard(answer, targets[other], how)
    return how.soft * _soft(answer, wanted, how.temperature, classifies=batch.classifies) + (1 - how.soft) * hard


def _hard(answer: Any, targets: Any, how: Fitting) -> Any:
    import torch

    if how.loss is not None:
        return how.loss(answer, targets)
    if targets.is_floating_point():
        return torch.nn.functional.mse_loss(answer.reshape(targets.shape), targets)
    if answer.ndim == 1 or answer.shape[-1] == 1:  # one probability a row
        return torch.nn.functional.binary_cross_entropy(answer.flatten().clamp(1e-6, 1 - 1e-6), targets.float())
    return torch.nn.functional.cross_entropy(answer.reshape(len(targets), -1), targets)


def _soft(answer: Any, wanted: Any, temperature: float, *, classifies: bool) -> Any:
    import torch

    if not classifies or answer.ndim == 1 or answer.shape[-1] == 1:
        return torch.nn.functional.mse_loss(answer, wanted)
    log = torch.nn.functional.log_softmax(answer / temperature, -1)
    share = torch.nn.functional.softmax(wanted / temperature, -1)
    return torch.nn.functional.kl_div(log, share, reduction="batchmean") * temperature**2


def tensors(rows: Rows) -> tuple[Any, ...]:
    """The inputs of rows, in the net's order."""
    import torch

    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in rows.inputs.values())


def first(answer: Any) -> Any:
    """The first output of a net that gives several."""
    return answer[0] if isinstance(answer, (tuple, list)) else answer


def outputs(net: Any, rows: Rows) -> Any:
    """The net's first output on rows, as one tensor."""
    import torch

    with torch.inference_mode():
        return torch.cat([first(net(*tensors(batch))) for batch in rows.batches(SCORED_AT_ONCE)])


def error(net: Any, rows: Rows) -> float:
    """What a net gets wrong, in points.

    Of classes the wrong share in per cent; of numbers the mean squared error in per cent of the targets' variance.
    """
    import torch

    answer = outputs(net, rows)
    targets = torch.from_numpy(rows.targets)
    if not rows.classifies:
        squared = float(((answer.reshape(targets.shape) - targets) ** 2).mean())
        return 100.0 * squared / max(float(targets.var()), 1e-12)
    flat = answer.reshape(len(answer), -1)
    chosen = flat.argmax(1) if flat.shape[1] > 1 else (flat[:, 0] > 0.5).long()
    return 100.0 * float((chosen != targets).double().mean())


def divergence(answer: Any, wanted: Any, *, classifies: bool) -> float:
    """How far answers are from others: Kullback-Leibler divergence of classes, else mean squares over variance."""
    import torch

    if classifies and answer.ndim > 1 and answer.shape[-1] > 1:
        log, share = torch.nn.functional.log_softmax(answer, -1), torch.nn.functional.softmax(wanted, -1)
        return max(0.0, float(torch.nn.functional.kl_div(log, share, reduction="batchmean")))
    return float(((answer - wanted) ** 2).mean() / wanted.var().clamp_min(1e-12))


def copied(net: Any) -> Any:
    """A net of its own with the same weights."""
    return copy.deepcopy(net)
