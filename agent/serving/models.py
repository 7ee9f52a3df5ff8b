"""A loaded model of the worker: micro-batching, feedback. It knows no HTTP.

Requests wait in a queue; a thread drains what waits into one batch, so that a lone request never waits for company. The
thread belongs to one loaded artifact: requests that began on an artifact end on it, whatever is activated meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from agent.protocol.manifest import Manifest
from agent.runtimes.base import Runtime, Tensors
from agent.serving.ipc import Counts
from agent.telemetry.recorder import Recorder

log = logging.getLogger(__name__)
QUEUE_LIMIT = 1024
REMEMBERED_ROWS = 65_536
CLOSE_S = 60.0


class QueueFullError(Exception):
    """More requests wait than the device will ever answer in time."""


class RetiredError(Exception):
    """The artifact was taken out between being looked up and being asked: ask what serves now."""


@dataclass
class _Pending:
    inputs: Tensors
    rows: int
    request_id: str
    came_at: float
    done: Callable[[Tensors | Exception], None]


class LoadedModel:
    """One artifact, its thread, its counts, and the predictions that feedback may still name.

    Args:
        manifest: of the artifact.
        deployment_id: that brought it.
        runtime: that has it loaded.
        allowed: by output, how far an answer may be from another version's that counts as the same.
    """

    def __init__(
        self,
        manifest: Manifest,
        deployment_id: str,
        runtime: Runtime,
        allowed: Mapping[str, float] | None = None,
    ) -> None:
        self.manifest = manifest
        self.allowed = allowed or {}
        self.runtime = runtime
        self.recorder = Recorder(manifest, deployment_id, runtime.provider)
        self._queue: queue.Queue[_Pending | None] = queue.Queue(QUEUE_LIMIT)
        self._predictions: OrderedDict[str, list[int]] = OrderedDict()
        self._remembered = 0
        self._retired = False
        self._began_at: float | None = None
        self._runs_since: float | None = None
        self.closed = False
        self._gone = False
        self._turn = threading.Lock()  # the runtime's: not every one takes two at a time
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name=f"model-{manifest.digest[:8]}", daemon=True)
        self._thread.start()

    async def infer(self, inputs: Tensors, request_id: str) -> Tensors:
        """One request.

        Args:
            inputs: checked against the manifest.
            request_id: the client's; feedback names it.

        Raises:
            QueueFullError: when too many wait.
            RetiredError: when the artifact was taken out meanwhile.
            Exception: whatever the runtime raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Tensors] = loop.create_future()

        def done(result: Tensors | Exception) -> None:
            loop.call_soon_threadsafe(_resolve, future, result)

        rows = rows_of(inputs)
        with self._lock:
            if self._retired:
                raise RetiredError
            try:
                self._queue.put_nowait(_Pending(inputs, rows, request_id, time.perf_counter(), done))
            except queue.Full:
                self.recorder.rejected()
                raise QueueFullError from None
        return await future

    def totals(self) -> Counts:
        """What it did since it was loaded, and how long it has been at what it does now."""
        return self.recorder.totals(_since(self._began_at), _since(self._runs_since))

    def feedback(self, request_id: str, labels: list[int]) -> int:
        """Count true labels of an earlier request; returns how many rows were matched (0 for an unknown id)."""
        with self._lock:
            predictions = self._predictions.pop(request_id, None)
            if predictions is None:
                return 0
            self._remembered -= len(predictions)
        for label, predicted in zip(labels, predictions, strict=False):
            self.recorder.labelled(label, predicted)
        return min(len(labels), len(predictions))

    def close(self) -> None:
        """Answer what waits, then let the artifact go."""
        with self._lock:
            self._retired = True
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        free = self._turn.acquire(timeout=CLOSE_S)
        self._gone = True
        self.runtime.close()
        self.closed = True
        if free:
            self._turn.release()

    def shadow(self, inputs: Tensors, rows: int, request_id: str) -> Tensors | None:
        """Answer a copy of a request, which nobody waits for, in the caller's thread.

        Returns:
            The answer; None when it failed, which is counted, or when the artifact was taken out meanwhile.
        """
        one = _Pending(inputs, rows, request_id, time.perf_counter(), lambda _result: None)
        self._began_at = one.came_at
        try:
            outputs = self._run(one)
        except RetiredError:
            return None
        except Exception:  # noqa: BLE001 (a model may fail in any way)
            self.recorder.answered(time.perf_counter() - one.came_at, rows, failed=True)
            self.recorder.shadowed()
            return None
        finally:
            self._began_at = None
        self._finish(one, outputs)
        self.recorder.shadowed()
        self.recorder.observed(inputs, outputs, rows, time.perf_counter())
        return outputs

    def _loop(self) -> None:
        carried: _Pending | None = None
        while True:
            first = carried or self._queue.get()
            if first is None:
                return
            self._began_at = first.came_at
            batch, carried, ended = self._drain(first)
            self._answer(batch)
            self._began_at = None
            if ended:
                return

    def _drain(self, first: _Pending) -> tuple[list[_Pending], _Pending | None, bool]:
        """What waits and fits into one batch with the first; the next that did not fit; whether the end was seen."""
        batch, rows = [first], first.rows
        while rows < self.manifest.max_batch:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return batch, None, True
            if rows + following.rows > self.manifest.max_batch or not _alike(first.inputs, following.inputs):
                return batch, following, False
            batch.append(following)
            rows += following.rows
        return batch, None, False

    def _answer(self, batch: list[_Pending]) -> None:
        if len(batch) == 1:
            self._answer_one(batch[0])
            return
        try:
            stacked = {name: np.concatenate([one.inputs[name] for one in batch]) for name in batch[0].inputs}
            outputs = self._infer(stacked)
            rows = sum(one.rows for one in batch)
            if any(value.ndim == 0 or value.shape[0] != rows for value in outputs.values()):
                raise ValueError("an output has no row for each input row")  # noqa: TRY301
        except Exception:  # noqa: BLE001 (one bad request must not fail its neighbours: each is tried alone)
            for one in batch:
                self._answer_one(one)
            return
        start = 0
        for one in batch:
            self._finish(one, {name: value[start : start + one.rows] for name, value in outputs.items()})
            start += one.rows
        self.recorder.observed(stacked, outputs, rows, time.perf_counter())

    def _answer_one(self, one: _Pending) -> None:
        try:
            outputs = self._run(one)
        except Exception as error:  # noqa: BLE001 (a model may fail in any way; the client is told)
            self.recorder.answered(time.perf_counter() - one.came_at, one.rows, failed=True)
            one.done(error)
            return
        self._finish(one, outputs)
        self.recorder.observed(one.inputs, outputs, one.rows, time.perf_counter())

    def _run(self, one: _Pending) -> Tensors:
        if one.rows == 1 or not self.manifest.row_by_row:
            return self._infer(one.inputs)
        rows = [
            self._infer({name: array[row : row + 1] for name, array in one.inputs.items()}) for row in range(one.rows)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _infer(self, inputs: Tensors) -> Tensors:
        """One inference, whose beginning is known to who looks for one that does not end."""
        with self._turn:
            if self._gone:
                raise RetiredError
            self._runs_since = time.perf_counter()
            try:
                return self.runtime.run(inputs)
            finally:
                self._runs_since = None

    def _finish(self, one: _Pending, outputs: Tensors) -> None:
        if one.request_id:
            self._remember(one, outputs)
        self.recorder.answered(time.perf_counter() - one.came_at, one.rows)
        one.done(outputs)

    def _remember(self, one: _Pending, outputs: Tensors) -> None:
        """Keep the winning class of each row, where the first output holds a score for each class."""
        scores = outputs[self.manifest.outputs[0].name]
        if scores.ndim != 2 or scores.shape[1] < 2 or scores.shape[0] != one.rows:
            return
        answers = [int(index) for index in scores.argmax(axis=1)]
        with self._lock:
            self._remembered += len(answers) - len(self._predictions.pop(one.request_id, ()))
            self._predictions[one.request_id] = answers
            while self._remembered > REMEMBERED_ROWS:
                self._remembered -= len(self._predictions.popitem(last=False)[1])


def rows_of(inputs: Tensors) -> int:
    """How many rows a request has."""
    first = next(iter(inputs.values()), None)
    return 1 if first is None or first.ndim == 0 else int(first.shape[0])


def _since(began: float | None) -> float:
    return 0.0 if began is None else time.perf_counter() - began


def _alike(one: Tensors, other: Tensors) -> bool:
    return all(
        array.ndim > 0 and other[name].ndim == array.ndim and other[name].shape[1:] == array.shape[1:]
        for name, array in one.items()
    )


def _resolve(future: asyncio.Future[Tensors], result: Tensors | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
