"""One inference request over many devices: who may answer, what each is sent, what becomes of what it says.

What goes where is decided by `fleet_server.domain.inference`; `fleet_server.domain.tensors` cuts and joins bodies.
Nothing is written: a request that ends with its server is asked again by who asked it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agent.protocol.limits import LIMITS
from agent.protocol.parts import FEATURE, InferPart
from fleet_server.db import Database
from fleet_server.domain.inference import Lane, Schedule, Sending
from fleet_server.domain.tensors import Asked, Tensor, TensorError, read_answer, write_answer
from fleet_server.errors import ConflictError, InvalidError, TooLargeError, UnavailableError
from fleet_server.inferences import repository
from fleet_server.inferences.dispatch import Answered, Dispatch, Exchange, Gone
from fleet_server.inferences.schemas import ANSWER_BYTES, MOST_LANES, MOST_REQUESTS

log = logging.getLogger(__name__)
HEADER_BYTES = 64 << 10  # of a part's body, that its JSON may have
LONGEST_WAIT_S = 1.0
UNSENT_S = 0.5  # that a lane rests when the broker's link takes no part
REASONS = 5


@dataclass(frozen=True)
class Wanted:
    """What is asked, and of whom.

    Attributes:
        model: its name.
        version: only of this version; None for the one that most of the devices serve.
        target: only of devices that this query holds for.
        timeout_s: how long it may take, in seconds.
    """

    model: str
    version: str | None
    target: str | None
    timeout_s: float


@dataclass(frozen=True)
class Plan:
    """Who may answer: lanes by the version that they all run.

    A lane of several devices would be the stages of a model that is cut: each device is sent what the one before gave.
    """

    version: str
    lanes: tuple[Lane, ...]


class Desk:
    """Answers requests, a few at once."""

    def __init__(self, database: Database, dispatch: Dispatch) -> None:
        self._database = database
        self._dispatch = dispatch
        self._room = threading.BoundedSemaphore(MOST_REQUESTS)

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Room for one request, whose tensors are in memory.

        Raises:
            UnavailableError: when there is none.
        """
        if not self._room.acquire(blocking=False):
            detail = f"{MOST_REQUESTS} requests are being answered already: try again in a second"
            raise UnavailableError("too_many_inferences", detail)
        try:
            yield
        finally:
            self._room.release()

    def infer(self, fleet_id: str, wanted: Wanted, asked: Asked) -> tuple[bytes, int | None]:
        """The answer, and the length of its JSON part where tensors follow it.

        Raises:
            ConflictError: when no device serves the model.
            InvalidError: when devices say that the request is wrong.
            TooLargeError: when a row fits into no message, or the answer has too many bytes.
            UnavailableError: when all devices failed, or the time is over.
        """
        plan = self._plan(fleet_id, wanted)
        row_bytes = asked.row_bytes()
        room = LIMITS.part_bytes - HEADER_BYTES
        if row_bytes > room:
            raise TooLargeError(
                "row_too_large",
                f"a row has {row_bytes} bytes, and a message to a device holds {room}: send smaller rows",
            )
        schedule = Schedule(asked.rows, plan.lanes, self._dispatch.speeds, most_rows=room // max(row_bytes, 1))
        exchange = self._dispatch.open()
        try:
            return _Request(wanted, plan, asked, schedule, exchange).run()
        finally:
            exchange.close()

    def _plan(self, fleet_id: str, wanted: Wanted) -> Plan:
        with self._database.read() as session:
            devices = repository.serving(session, fleet_id, wanted.model, wanted.target, most=MOST_LANES)
            found = [
                (device.id, one["version"])
                for device in devices
                if FEATURE in device.facts.get("features", ())
                for one in device.serving
                if one["model"] == wanted.model and wanted.version in {None, one["version"]}
            ]
        if not found:
            what = wanted.model if wanted.version is None else f"{wanted.model}@{wanted.version}"
            silent = f" ({len(devices)} do, but can't be asked: old agents, or owners who forbid it)" if devices else ""
            detail = f"no device that is online serves {what}{silent}: roll it out, or widen `target`"
            raise ConflictError("no_device_serves", detail)
        counts = Counter(version for _, version in found)
        version = max(counts, key=lambda one: (counts[one], one))  # answers of two versions are not mixed
        chosen = sorted({device for device, of in found if of == version})
        return Plan(version, tuple(Lane(f"{one} {wanted.model}@{version}", (one,)) for one in chosen))


class _Request:
    """One request while it is answered, by one thread."""

    def __init__(self, wanted: Wanted, plan: Plan, asked: Asked, schedule: Schedule, exchange: Exchange) -> None:
        self._wanted = wanted
        self._plan = plan
        self._asked = asked
        self._schedule = schedule
        self._exchange = exchange
        self._began = time.monotonic()
        self._deadline = self._began + wanted.timeout_s
        self._answers: dict[int, tuple[Tensor, ...]] = {}
        self._bytes = 0
        self._wrong: dict[str, str] = {}

    def run(self) -> tuple[bytes, int | None]:
        while not self._schedule.done:
            now = time.monotonic()
            if now >= self._deadline:
                self._fail_late()
            for sending in self._schedule.send(now):
                self._send(sending)
            if self._schedule.stuck:
                self._fail()
            wait = min(self._schedule.wake_at(), self._deadline, now + LONGEST_WAIT_S) - time.monotonic()
            event = self._exchange.get(max(wait, 0.005))
            if isinstance(event, Gone):
                self._schedule.gone(event.device)
            elif event is not None:
                self._heard(event)
        parts = [self._answers[first] for first in sorted(self._answers)]
        said: dict[str, Any] = {"model_name": self._wanted.model, "model_version": self._plan.version}
        if self._asked.id:
            said["id"] = self._asked.id
        said["parameters"] = {
            "took_s": round(time.monotonic() - self._began, 6),
            "reissued": self._schedule.reissued,
            "devices": [
                {"device": device, "rows": one.rows, "left_out": one.out}
                for one in self._schedule.report()
                for device in one.lane.devices
            ],
        }
        return write_answer(parts, said, binary=self._asked.binary)

    def _send(self, sending: Sending) -> None:
        body, header_length = self._asked.part(sending.first, sending.last)
        left_ms = max(1, int(1000 * (self._deadline - time.monotonic())))
        part = InferPart("", sending.attempt, self._wanted.model, body, header_length, self._plan.version, left_ms)
        lane = sending.lane
        if not self._exchange.send(lane.devices[0], lane.devices, sending.id, part):
            self._schedule.refuse(sending.id, time.monotonic(), UNSENT_S)

    def _heard(self, event: Answered) -> None:
        now, answer = time.monotonic(), event.answer
        lane = self._schedule.lane_of(event.sending)
        if lane is None:
            return
        if answer.status == 200:
            self._right(event, lane, now)
        elif answer.status in {429, 503}:
            self._schedule.refuse(event.sending, now, answer.retry_after_s)
        elif answer.status == 413:
            if not self._schedule.divide(event.sending):
                raise TooLargeError(
                    "row_too_large", f"{event.device}: of a single row {answer.error}: send smaller rows"
                )
        elif answer.status == 400:
            raise InvalidError("wrong_input", f"inputs: {event.device}: {answer.error}", field="inputs")
        else:
            self._schedule.leave_out(lane.id, f"{event.device}: {answer.status} {answer.error}")

    def _right(self, event: Answered, lane: Lane, now: float) -> None:
        rows = self._schedule.rows_of(event.sending)
        try:
            outputs, _ = read_answer(event.answer.body, event.answer.header_length, rows)
            self._compare(outputs)
        except TensorError as error:
            self._schedule.leave_out(lane.id, f"{event.device} answered what is no answer: {error}")
            return
        span = self._schedule.take(event.sending, now)
        if span is None:
            return
        self._answers[span[0]] = outputs
        self._bytes += sum(one.data.nbytes for one in outputs)
        if self._bytes > ANSWER_BYTES:
            detail = f"the answers have more than {ANSWER_BYTES >> 20} MiB: ask for fewer rows at once"
            raise TooLargeError("answer_too_large", detail)

    def _compare(self, outputs: tuple[Tensor, ...]) -> None:
        """With what came first: rows of both must stand in the same tensors."""
        first = next(iter(self._answers.values()), None)
        if first is None:
            return
        if len(first) != len(outputs) or not all(a.like(b) for a, b in zip(first, outputs, strict=True)):
            raise TensorError("outputs: their names, datatypes or shapes are other than what another device answered")

    def _fail(self) -> None:
        said = [one.out for one in self._schedule.report() if one.out]
        more = f"; and {len(said) - REASONS} more" if len(said) > REASONS else ""
        detail = f"no device answered: {'; '.join(said[:REASONS])}{more}: mend them, or widen `target`"
        raise UnavailableError("device_failed", detail[: LIMITS.detail_chars])

    def _fail_late(self) -> None:
        done = sum(tensors[0].rows for tensors in self._answers.values())
        detail = (
            f"after {self._wanted.timeout_s:g} s {self._asked.rows - done} of {self._asked.rows} rows have no answer: "
            "give it more time (timeout_s), or more devices"
        )
        raise UnavailableError("deadline", detail)
