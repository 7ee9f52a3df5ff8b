"""A live net on the user's machine: its rows, recovery training by its own optimizer and loss, and files to push.

The one module of the SDK that runs torch and the converters. A server never sees the net's code.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_server.sdk.errors import NetError

Say = Callable[[str], None]
CALIBRATION_ROWS = 512
TIMED_ROWS = 32
TIMES = 15
AS_FAST = 1.1  # times that are closer are told apart by chance
AWARE = "-qat"  # ends the names of nets that were fine-tuned for integers


@dataclass(frozen=True)
class Compression:
    """What to do with a net before it is pushed.

    Attributes:
        prune: `adaptive` within the budget, a share of the work that is to be left, or None.
        student: a smaller net that is to learn from this one; None for none.
        quantize_aware: whether nets are also fine-tuned for integers.
        epochs: of each fine-tuning.
        budget_points: that all of it may cost.
        seed: of every random choice.
    """

    prune: str | float | None
    student: Any
    quantize_aware: bool
    epochs: float
    budget_points: float
    seed: int

    @property
    def any(self) -> bool:
        """Whether there is something to do."""
        return self.prune is not None or self.student is not None or self.quantize_aware


@dataclass(frozen=True)
class Chosen:
    """The net that is pushed.

    Attributes:
        name: `whole`, or of the passes that made it, such as `pruned`.
        net: in evaluation mode.
        onnx: the file of it.
        error: on the evaluation rows, in points; None without such rows.
        tried: one row for each net that there was: its name, error and seconds a batch.
        problems: why a pass could not be done, a sentence each.
    """

    name: str
    net: Any
    onnx: Path
    error: float | None
    tried: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]


class LiveNet:
    """A net with what trains it.

    Args:
        net: a torch.nn.Module.
        optimizer: of its parameters; recovery training makes one of the same class and settings.
        criterion: of the first output and the targets, a scalar.
        example_inputs: a tensor, or a tuple of one for each parameter of `forward`; the first axis counts rows.
        train: batches `(inputs…, targets)`, such as a DataLoader, or `(inputs, targets)` whole; None: no
            training.
        evaluate: held-out rows, likewise.

    Raises:
        NetError: saying what does not fit.
    """

    def __init__(
        self, net: Any, optimizer: Any, criterion: Any, *, example_inputs: Any, train: Any, evaluate: Any
    ) -> None:
        import torch

        if not isinstance(net, torch.nn.Module):
            raise NetError(f"net: {type(net).__name__} is no torch.nn.Module: give the net itself, not its class")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise NetError(
                f"optimizer: {type(optimizer).__name__} is no torch.optim.Optimizer: give the one that trains"
            )
        if criterion is not None and not callable(criterion):
            raise NetError("criterion: give a function of (outputs, targets), such as torch.nn.CrossEntropyLoss()")
        self.net, self.criterion = net, criterion
        self._optimizer = optimizer
        self.examples = _example_rows(net, example_inputs)
        self.train = None if train is None else _rows(train, list(self.examples), "train")
        self.evaluate = None if evaluate is None else _rows(evaluate, list(self.examples), "evaluate")
        self._check()

    def _check(self) -> None:
        """The net takes what it was given."""
        import torch

        tensors = [torch.from_numpy(array) for array in self.examples.values()]
        was = self.net.training
        try:
            with torch.inference_mode():
                self.net.eval()(*tensors)
        except Exception as error:
            shapes = {name: list(array.shape) for name, array in self.examples.items()}
            raise NetError(
                f"example_inputs: the net does not take {shapes}: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.net.train(was)
        for field, rows in (("train", self.train), ("evaluate", self.evaluate)):
            for name, array in self.examples.items() if rows is not None else ():
                got = rows.inputs[name]  # type: ignore[union-attr]
                if got.shape[1:] != array.shape[1:]:
                    said = (
                        f"{name!r} has rows of shape {list(got.shape[1:])}, but example_inputs {list(array.shape[1:])}"
                    )
                    raise NetError(f"{field}: {said}: give the rows that the net takes")

    def score(self, net: Any = None) -> dict[str, float]:
        """`loss` by the criterion, and `accuracy` (0 to 1) where the targets are classes, on the evaluation rows.

        Args:
            net: another than its own, such as the one that was chosen.

        Raises:
            NetError: without evaluation rows.
        """
        from converters.training.fit import error, outputs

        if self.evaluate is None:
            raise NetError("evaluate: there are no rows to evaluate on: give compile(evaluate=…)")
        import torch

        one = self.net if net is None else net
        was = one.training
        try:
            one.eval()
            found: dict[str, float] = {}
            if self.criterion is not None:
                answers = outputs(one, self.evaluate).clone()
                found["loss"] = float(self.criterion(answers, torch.from_numpy(self.evaluate.targets)))
            if self.evaluate.classifies:
                found["accuracy"] = 1.0 - error(one, self.evaluate) / 100.0
            return found
        finally:
            one.train(was)

    def compressed(self, wanted: Compression, folder: Path, say: Say) -> Chosen:
        """Make the nets that are wanted, and choose the fastest whose error rose by no more than the budget.

        Raises:
            NetError: when the net can't be exported, or there is nothing to train on.
        """
        from converters.errors import ConversionError
        from converters.training.compress import Compressed, compress

        net = self._copied()
        nets, problems = [Compressed("whole", net, ())], list[str]()
        if wanted.any:
            if self.train is None:
                raise NetError("train: pruning, distillation and quantization-aware training need compile(train=…)")
            try:
                made, problems = compress(net, self.train, self._plan(wanted), say, validation=self.evaluate)
            except ConversionError as error:
                raise NetError(error.detail) from None
            nets += made
        return self._chosen(nets, problems, wanted.budget_points, folder, say)

    def _copied(self) -> Any:
        """The net as it is now, in evaluation mode on the CPU: the user's own is never changed."""
        import copy

        try:
            return copy.deepcopy(self.net).cpu().eval()
        except Exception as error:
            raise NetError(f"net: it can't be copied ({type(error).__name__}: {error})") from error

    def _plan(self, wanted: Compression) -> Any:
        from converters.training.compress import CompressionPlan
        from converters.training.fit import Fitting

        student = wanted.student
        return CompressionPlan(
            prune=wanted.prune,
            student=None if student is None else lambda: student,
            quantize_aware=wanted.quantize_aware,
            budget=wanted.budget_points,
            how=Fitting(epochs=wanted.epochs, seed=wanted.seed, optimizer=self._optimizers(), loss=self.criterion),
        )

    def _optimizers(self) -> Callable[[list[Any]], Any] | None:
        """Makes optimizers of the user's class and settings, of other parameters."""
        if self._optimizer is None:
            return None
        kind = type(self._optimizer)
        taken = inspect.signature(kind.__init__).parameters
        settings = {name: value for name, value in self._optimizer.defaults.items() if name in taken}
        # As they are now: a schedule may have lowered the rate to nothing.
        if "initial_lr" in self._optimizer.param_groups[0]:
            settings["lr"] = self._optimizer.param_groups[0]["initial_lr"]
        return lambda parameters: kind(parameters, **settings)

    def _chosen(self, nets: Sequence[Any], problems: list[str], budget: float, folder: Path, say: Say) -> Chosen:
        from converters.errors import ConversionError
        from converters.steps.export import export_forms
        from converters.training.fit import error

        tried: list[tuple[dict[str, Any], Any, Path]] = []
        for one in nets:
            say(f"export {one.name}")
            try:
                files = export_forms(one.net, self.examples, folder, one.name, tflite=False)
            except ConversionError as problem:
                if one.name == "whole":
                    raise NetError(problem.detail) from problem
                problems.append(f"{one.name}: {problem.detail}")
                continue
            path = next(iter(files.values()))
            wrong = None if self.evaluate is None else error(one.net, self.evaluate)
            row = {
                "net": one.name,
                "error": wrong,
                "seconds": _seconds(path, self.examples),
                "bytes": path.stat().st_size,
            }
            tried.append((row, one.net, path))
        row, net, path = tried[best([one[0] for one in tried], budget)]
        return Chosen(row["net"], net, path, row["error"], tuple(one[0] for one in tried), tuple(problems))


def best(tried: Sequence[Mapping[str, Any]], budget: float) -> int:
    """Which of the nets is pushed: pure.

    Args:
        tried: of each its `net`, `error`, `seconds` and `bytes`; the first is the whole net.
        budget: points by which the error may rise.

    Returns:
        The number of the smallest of those that are as fast as the fastest within the budget.
    """
    whole = tried[0]["error"]
    fitting = [number for number, one in enumerate(tried) if whole is None or one["error"] <= whole + budget]
    ready = {tried[number]["net"].removesuffix(AWARE) for number in fitting if tried[number]["net"].endswith(AWARE)}
    # What was fine-tuned for integers is as fast as what it was made of, and better in integers.
    left = [number for number in fitting if tried[number]["net"] not in ready]
    fastest = min(tried[number]["seconds"] for number in left)
    return min((n for n in left if tried[n]["seconds"] <= fastest * AS_FAST), key=lambda n: float(tried[n]["bytes"]))


def write_rows(rows: Any, path: Path, *, targets: bool, most: int | None = None) -> None:
    """Rows as an `.npz` that a server takes: an array for each input, and class indices as `y` where wanted."""
    import numpy as np

    part = rows if most is None else rows.first(most)
    arrays = dict(part.inputs)
    if targets and rows.classifies:
        arrays["y"] = part.targets
    np.savez(path, **arrays)


def _seconds(path: Path, examples: Mapping[str, Any]) -> float:
    """How long a batch takes in ONNX Runtime on one thread here, the least of some tries."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {
        value.name: np.repeat(array[:1], TIMED_ROWS, 0)
        for value, array in zip(session.get_inputs(), examples.values(), strict=True)
    }
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        session.run(None, feed)
        found.append(time.perf_counter() - started)
    return min(found)


def _example_rows(net: Any, given: Any) -> dict[str, Any]:
    """Two example rows by the names of `forward`'s parameters."""
    import numpy as np

    arrays = [_array(one, "example_inputs") for one in (given if isinstance(given, (tuple, list)) else (given,))]
    names = [
        one.name
        for one in inspect.signature(net.forward).parameters.values()
        if one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}
    ]
    if len(names) < len(arrays):
        names = [f"input_{number}" for number in range(len(arrays))]
    for array in arrays:
        if array.ndim == 0 or len(array) == 0:
            raise NetError("example_inputs: the first axis counts rows: give one at least, such as x[:2]")
    return {name: np.repeat(array, 2, 0)[:2] for name, array in zip(names, arrays, strict=False)}


def _rows(given: Any, names: list[str], field: str) -> Any:
    """Rows of batches, or of whole tensors."""
    import numpy as np

    from converters.training.data import LEAST_ROWS, Rows

    whole = isinstance(given, (tuple, list)) and bool(given) and all(hasattr(one, "shape") for one in given)
    if not whole and not isinstance(given, Iterable):
        raise NetError(f"{field}: {type(given).__name__} gives no batches: give a DataLoader, or (inputs, targets)")
    parts = [_batch(batch, names, field) for batch in ([given] if whole else given)]
    if not parts:
        raise NetError(f"{field}: it gives no batch")
    try:
        *inputs, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    except ValueError as error:
        raise NetError(f"{field}: its batches do not go together: {error}") from None
    if len({len(one) for one in (*inputs, targets)}) != 1:
        raise NetError(f"{field}: inputs and targets need the same number of rows")
    if field == "train" and len(targets) < LEAST_ROWS:
        raise NetError(f"{field}: it has {len(targets)} rows, at least {LEAST_ROWS} are needed")
    if targets.dtype.kind not in "iuf":
        raise NetError(f"{field}: targets hold {targets.dtype}: class indices or floats are meant")
    dtype = np.int64 if targets.dtype.kind in "iu" else np.float32
    return Rows(dict(zip(names, inputs, strict=True)), targets.astype(dtype))


def _batch(batch: Any, names: list[str], field: str) -> list[Any]:
    """Inputs and targets of one batch, as arrays."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise NetError(f"{field}: a batch is (inputs, targets), not {type(batch).__name__}")
    *inputs, targets = batch
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        inputs = list(inputs[0])
    if len(inputs) != len(names):
        raise NetError(f"{field}: a batch has {len(inputs)} inputs, but the net takes {len(names)}: {names}")
    return [_array(one, field) for one in (*inputs, targets)]


def _array(given: Any, field: str) -> Any:
    import numpy as np

    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    if not hasattr(given, "dtype"):
        raise NetError(f"{field}: {type(given).__name__} is neither a tensor nor an array")
    return np.ascontiguousarray(given)
