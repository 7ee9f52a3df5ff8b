"""A loaded model of the worker: micro-batching, feedback. It knows no HTTP.

Requests wait in a queue; a thread drains what waits into one batch, so that a lone request never waits for company
unless its profile asks for that. The thread belongs to one loaded artifact: requests that began on an artifact end on
it, whatever is activated meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from functools import partial

import numpy as np

from agent.protocol.manifest import Manifest
from agent.runtimes import let_go
from agent.runtimes.base import Runtime, Tensors
from agent.samples.offering import Sampler
from agent.serving.batch_times import BatchTimes
from agent.serving.company import Company
from agent.serving.ipc import Counts
from agent.serving.processors import pin
from agent.serving.results import Heard, Results
from agent.serving.statistics import Statistics
from agent.serving.waiting import DEFAULT, ClosedError, DeadlineError, QueueFullError, Request, RequestQueue
from agent.telemetry.recorder import Recorder
from agent.trial.scoring import answering

log = logging.getLogger(__name__)
REMEMBERED_ROWS = 65_536
CLOSE_S = 60.0
_Seen = tuple[Tensors, Tensors, int]  # inputs, outputs, and how many rows they have
AT_ONCE_S = 0.001  # inferences shorter than this are not worth another thread's waking up, twice
ALONE_S = 0.01  # nor are these, where nobody else is kept waiting


class RetiredError(Exception):
    """The artifact was taken out between being looked up and being asked: ask what serves now."""


class LoadedModel:
    """One artifact, its thread, its counts, and the predictions that feedback may still name.

    Args:
        manifest: of the artifact.
        deployment_id: that brought it.
        runtime: that has it loaded.
        allowed: by output, how far an answer may be from another version's that counts as the same.

    Attributes:
        sampler: chooses rows that may be kept; None where none are.
        company: the artifacts that the event loop serves beside this one.
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
        self._statistics = Statistics()
        self.sampler: Sampler | None = None
        self.company = Company()
        self._queue = RequestQueue(manifest.scheduling.queue_limit)
        self._times = BatchTimes()
        self._ran: deque[tuple[int, float]] = deque()  # rows and seconds of what is not counted yet
        self._predictions: OrderedDict[str, list[int]] = OrderedDict()
        self._remembered = 0
        self._began_at: float | None = None
        self._runs_since: float | None = None
        self.closed = False
        self._gone = False
        self._alone = False
        self._at_once = False  # the event loop is about to take what waits
        self._results: Results | None = None
        self._turn = threading.Lock()  # the runtime's: not every one takes two at a time
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name=f"model-{manifest.digest[:8]}", daemon=True)
        self._thread.start()

    @property
    def statistics(self) -> Statistics:
        """What it did, up to now."""
        self._count_runs()
        return self._statistics

    async def infer(
        self, inputs: Tensors, request_id: str, *, priority: int = DEFAULT, timeout_s: float = 0.0
    ) -> Tensors:
        """One request.

        Args:
            inputs: checked against the manifest.
            request_id: the client's; feedback names it.
            priority: the most urgent go first (`agent.serving.waiting`).
            timeout_s: how long it may wait for its turn, in seconds; 0 for as long as it takes.

        Raises:
            QueueFullError: when too many wait, now or before its turn came. Who tells the client counts it as refused.
            DeadlineError: when its turn did not come in time.
            RetiredError: when the artifact was taken out meanwhile.
            CancelledError: when the caller is cancelled; where its turn has not come, it is not run.
            Exception: whatever the runtime raises.
        """
        future: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        request = self.take(inputs, request_id, partial(_settle, future), priority=priority, timeout_s=timeout_s)
        try:
            return await future
        except asyncio.CancelledError:
            self._queue.give_up(request)  # nobody waits for it any more
            raise

    def take(
        self, inputs: Tensors, request_id: str, heard: Heard, *, priority: int = DEFAULT, timeout_s: float = 0.0
    ) -> Request:
        """The same for one who is not kept waiting: called in the event loop, as is who hears what became of it.

        Args:
            inputs: as `infer` takes them, like all others.
            request_id: likewise.
            heard: is told once, the outputs or what `infer` would raise; never before this returns.
            priority: likewise.
            timeout_s: likewise.

        Raises:
            QueueFullError: when too many wait.
            RetiredError: when the artifact was taken out meanwhile.
        """
        loop = asyncio.get_running_loop()
        results = self._results
        if results is None or results.loop is not loop:
            results = self._results = Results(loop)
        request = Request(inputs, rows_of(inputs), request_id, time.perf_counter(), _ignore, priority)
        expiry = loop.call_later(timeout_s, self._expire, request) if timeout_s > 0 else None
        request.done = partial(results.add, heard if expiry is None else partial(_in_time, expiry, heard))
        self._alone = self.company.is_alone(self, request.came_at)
        at_once = self._at_once or self._is_short(request.rows, self._longest_s(len(self._queue) + 1))
        try:
            gone = self._queue.put(request, wake=not at_once)
        except (ClosedError, QueueFullError) as error:
            if expiry is not None:
                expiry.cancel()
            if isinstance(error, ClosedError):
                raise RetiredError from None
            raise QueueFullError(self._retry_after_s()) from None
        if gone is not None:
            gone.done(QueueFullError(self._retry_after_s(), time.perf_counter() - gone.came_at))
        if at_once and not self._at_once:
            self._at_once = True
            loop.call_soon(loop.call_soon, self._take_at_once, results)  # what has come meanwhile is read before
        return request

    def infer_now(self, inputs: Tensors, request_id: str, heard: Heard) -> bool:
        """One request, answered before the event loop does anything else; false where it had better wait its turn.

        Args:
            inputs: as `infer` takes them.
            request_id: likewise.
            heard: is told before this returns.
        """
        came_at, rows = time.perf_counter(), rows_of(inputs)
        self._alone = self.company.is_alone(self, came_at)
        if (
            self._began_at is not None
            or len(self._queue)
            or rows > self.manifest.max_batch
            or not self._is_short(rows, self._longest_s(1))
        ):
            return False
        one = Request(inputs, rows, request_id, came_at, heard)
        self._began_at = one.turn_at = came_at
        outputs: Tensors = {}
        result: Tensors | Exception
        try:
            result = outputs = self._run(inputs, rows)
        except Exception as error:  # noqa: BLE001 (a model may fail in any way; the client is told)
            result = error
        self._began_at = None
        now, failed = time.perf_counter(), isinstance(result, Exception)
        if not failed:
            self._remember(one, outputs)  # before its client can say what was right
        heard(result)
        if not isinstance(result, RetiredError):
            self._answered([one], now, failed=failed)
        self._observed([] if failed else [(inputs, outputs, rows)])
        return True

    def _is_short(self, rows: int, longest_s: float) -> bool:
        """Whether the event loop itself may infer, which reads no requests while it does."""
        scheduling = self.manifest.scheduling
        if scheduling.cores or scheduling.batch_wait_ms:
            return False
        seconds = self._times.seconds(rows)
        return seconds is not None and seconds <= longest_s

    def _longest_s(self, waiting: int) -> float:
        """How long an inference in the event loop may take, with so many requests that wait for it."""
        return ALONE_S if self._alone and waiting <= 1 else AT_ONCE_S

    def _take_at_once(self, results: Results) -> None:
        """Answer a batch of what waits, in the event loop. What the thread has begun meanwhile, it goes on with."""
        self._at_once = False
        if self._began_at is not None:
            return
        if not self._is_short(1, self._longest_s(len(self._queue))):
            self._queue.wake()
            return
        first = self._queue.take_now()
        if first is None:
            return
        self._began_at = first.came_at
        results.gather()
        try:
            seen = self._answer(self._batch(first, AT_ONCE_S))
        finally:
            self._began_at = None
            results.tell()
        results.loop.call_soon(self._observed, seen)  # behind the answers, which are sent before that
        if len(self._queue):
            self._at_once = True
            results.loop.call_soon(self._take_at_once, results)

    def _expire(self, request: Request) -> None:
        if self._queue.give_up(request):
            self._answered([request], time.perf_counter(), failed=True)
            request.done(DeadlineError())

    def _retry_after_s(self) -> float:
        """When all that waits will have been answered."""
        batch = self._times.seconds(self.manifest.max_batch)
        return 1.0 if batch is None else math.ceil(len(self._queue) / self.manifest.max_batch) * batch

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._queue)

    def load(self) -> tuple[float, float]:
        """How long what waits will take, and how long an inference of one row takes, in seconds; 0 where unknown."""
        batches, more = divmod(len(self._queue), self.manifest.max_batch)
        whole, last, one = (self._times.seconds(rows) or 0.0 for rows in (self.manifest.max_batch, max(more, 1), 1))
        return batches * whole + (last if more else 0.0), one

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
        self._queue.close()
        self._thread.join(CLOSE_S)
        free = self._turn.acquire(timeout=CLOSE_S)
        self._gone = True
        let_go(self.runtime)
        self.closed = True
        if free:
            self._turn.release()

    def shadow(self, inputs: Tensors, rows: int, request_id: str) -> Tensors | None:
        """Answer a copy of a request, which nobody waits for, in the caller's thread.

        Returns:
            The answer; None when it failed, which is counted, or when the artifact was taken out meanwhile.
        """
        one = Request(inputs, rows, request_id, time.perf_counter(), _ignore)
        self._began_at = one.turn_at = one.came_at
        try:
            outputs = self._run(inputs, rows)
        except RetiredError:
            return None
        except Exception:  # noqa: BLE001 (a model may fail in any way)
            self._answered([one], time.perf_counter(), failed=True)
            self._count_runs()
            self.recorder.shadowed()
            return None
        finally:
            self._began_at = None
        self._finish([one], [outputs])
        self._count_runs()
        self.recorder.shadowed()
        self.recorder.observed(inputs, outputs, rows, time.perf_counter())
        return outputs

    def _loop(self) -> None:
        pin(self.manifest.scheduling.cores)
        while (first := self._queue.take()) is not None:
            self._began_at = first.came_at
            self._observed(self._answer(self._batch(first)))
            self._began_at = None
            if self._is_short(1, AT_ONCE_S) and self._queue.leave():
                self._hand_back()

    def _hand_back(self) -> None:
        """What waits is short: the event loop takes it from here on."""
        results = self._results
        try:
            assert results is not None
            results.loop.call_soon_threadsafe(self._take_at_once, results)
        except RuntimeError:  # the loop is closed
            self._queue.wake()

    def _batch(self, first: Request, longest_s: float = math.inf) -> list[Request]:
        """What waits and may be answered together with the first, and what comes while that may wait for it."""
        batch, rows, scheduling = [first], first.rows, self.manifest.scheduling
        until = first.came_at + scheduling.batch_wait_ms / 1000
        most = self._most_rows(first.came_at, longest_s)

        def fits(one: Request) -> bool:
            return rows + one.rows <= most and _alike(first.inputs, one.inputs)

        while rows < most and (following := self._queue.take_like(fits, until)) is not None:
            batch.append(following)
            rows += following.rows
        turn_at = time.perf_counter()
        for one in batch:
            one.turn_at = turn_at
        return batch

    def _most_rows(self, came_at: float, longest_s: float) -> int:
        """The largest batch that takes no longer than a request ought to, and no longer than it may.

        What is left of that is never taken for less than half: a request that has waited for longer is late whatever is
        done, and smaller batches would only make those behind it wait longer still.
        """
        target_s, most = self.manifest.scheduling.latency_target_ms / 1000, self.manifest.max_batch
        if target_s:
            longest_s = min(longest_s, max(target_s - (time.perf_counter() - came_at), target_s / 2))
        return most if longest_s == math.inf else self._times.most(most, longest_s)

    def _answer(self, batch: list[Request]) -> list[_Seen]:
        """Answer a batch; what is to be observed of it when those who asked have their answers."""
        if len(batch) == 1:
            return self._answer_one(batch[0])
        try:
            stacked = {name: np.concatenate([one.inputs[name] for one in batch]) for name in batch[0].inputs}
            outputs = self._infer(stacked)
            rows = sum(one.rows for one in batch)
            if any(value.ndim == 0 or value.shape[0] != rows for value in outputs.values()):
                raise ValueError("an output has no row for each input row")  # noqa: TRY301
        except Exception:  # noqa: BLE001 (one bad request must not fail its neighbours: each is tried alone)
            return [seen for one in batch for seen in self._answer_one(one)]
        start, mine = 0, []
        for one in batch:
            mine.append({name: value[start : start + one.rows] for name, value in outputs.items()})
            start += one.rows
        self._finish(batch, mine)
        return [(stacked, outputs, rows)]

    def _answer_one(self, one: Request) -> list[_Seen]:
        try:
            outputs = self._run(one.inputs, one.rows)
        except Exception as error:  # noqa: BLE001 (a model may fail in any way; the client is told)
            self._answered([one], time.perf_counter(), failed=True)
            one.done(error)
            return []
        self._finish([one], [outputs])
        return [(one.inputs, outputs, one.rows)]

    def _observed(self, seen: list[_Seen]) -> None:
        """A batch was answered, and those who asked have their answers."""
        self._count_runs()
        for inputs, outputs, rows in seen:
            self.recorder.observed(inputs, outputs, rows, time.perf_counter())
            if self.sampler is not None:
                self.sampler.offer(inputs, outputs, rows)

    def _run(self, inputs: Tensors, count: int) -> Tensors:
        if count == 1 or not self.manifest.row_by_row:
            return self._infer(inputs)
        rows = [self._infer({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _infer(self, inputs: Tensors) -> Tensors:
        """One inference, whose beginning is known to who looks for one that does not end."""
        with self._turn:
            if self._gone:
                raise RetiredError
            self._runs_since = began = time.perf_counter()
            try:
                outputs = self.runtime.run(inputs)
            finally:
                self._runs_since = None
            self._ran.append((rows_of(inputs), time.perf_counter() - began))
            return outputs

    def _count_runs(self) -> None:
        """Count what ran, behind the answers: that is nothing to wait for."""
        with self._lock:
            while self._ran:
                rows, took = self._ran.popleft()
                self._times.measured(rows, took)
                self._statistics.ran(rows, took)

    def _finish(self, batch: list[Request], outputs: list[Tensors]) -> None:
        """Requests have their answers: what is to be known of them before their clients do, and then tell them."""
        for one, its in zip(batch, outputs, strict=True):
            self._remember(one, its)
        self._answered(batch, time.perf_counter())
        for one, its in zip(batch, outputs, strict=True):
            one.done(its)

    def _answered(self, batch: list[Request], now: float, *, failed: bool = False) -> None:
        seconds = [now - one.came_at for one in batch]
        rows, waited = sum(one.rows for one in batch), sum((one.turn_at or now) - one.came_at for one in batch)
        self.recorder.answered(seconds, rows, failed=failed)
        self._statistics.answered(waited, sum(seconds) - waited, rows, failed=failed, requests=len(batch))

    def _remember(self, one: Request, outputs: Tensors) -> None:
        """Keep the winning class of each row, where a request has a name and an output a score for each class."""
        if not one.request_id:
            return
        try:
            scores = outputs[answering(self.manifest.outputs, outputs)]
        except (KeyError, ValueError) as error:
            log.warning("feedback on answers of %s can't be counted: %s", self.manifest.model, error)
            return
        if scores.dtype.kind in "OU" or scores.ndim != 2 or scores.shape[1] < 2 or scores.shape[0] != one.rows:
            return
        answers = [int(index) for index in scores.argmax(axis=1)]
        with self._lock:
            self._remembered += len(answers) - len(self._predictions.pop(one.request_id, ()))
            self._predictions[one.request_id] = answers
            while self._remembered > REMEMBERED_ROWS:
                self._remembered -= len(self._predictions.popitem(last=False)[1])


def _settle(future: asyncio.Future[Tensors], result: Tensors | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _in_time(expiry: asyncio.TimerHandle, heard: Heard, result: Tensors | Exception) -> None:
    expiry.cancel()
    heard(result)


def _ignore(_result: Tensors | Exception) -> None:
    """Nobody waits for it."""


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
