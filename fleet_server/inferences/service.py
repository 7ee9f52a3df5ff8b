"""One inference request over many devices: who may answer, what each is sent, what becomes of what it says.

What goes where is decided by `fleet_server.domain.inference`; `fleet_server.domain.tensors` cuts and joins bodies.
Nothing is written: a request that ends with its server is asked again by who asked it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS
from agent.protocol.parts import FEATURE, Hop, InferPart
from fleet_server.db import Database
from fleet_server.domain.inference import IN_FLIGHT, Lane, Schedule, Sending
from fleet_server.domain.tensors import Asked, Tensor, TensorError, as_request, read_answer, write_answer
from fleet_server.errors import ConflictError, InvalidError, TooLargeError, UnavailableError
from fleet_server.inferences import repository
from fleet_server.inferences.dispatch import Answered, Dispatch, Exchange, Gone
from fleet_server.inferences.schemas import ANSWER_BYTES, MOST_LANES, MOST_REQUESTS
from fleet_server.models import Device

log = logging.getLogger(__name__)
HEADER_BYTES = 64 << 10  # of a part's body, that its JSON may have
LONGEST_WAIT_S = 1.0
UNSENT_S = 0.5  # that a lane rests when the broker's link takes no part
REASONS = 5
REPLAN_S = 0.5
KEPT_ARTIFACTS = 10_000


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

    A lane of several devices is the stages of a model that is cut: each device is sent what the one before gave.

    Attributes:
        version: that all lanes run.
        lanes: that may answer.
        hops: of each lane, by its id: its devices with what each runs.
        fixed_rows: of lanes whose model takes one number of rows and no other, by their ids.
    """

    version: str
    lanes: tuple[Lane, ...]
    hops: dict[str, tuple[Hop, ...]]
    fixed_rows: dict[str, int] = field(default_factory=dict)

    @property
    def staged(self) -> bool:
        """Whether its model is cut into stages."""
        return any(len(one.devices) > 1 for one in self.lanes)


class Desk:
    """Answers requests, a few at once."""

    def __init__(self, database: Database, dispatch: Dispatch) -> None:
        self._database = database
        self._dispatch = dispatch
        self._room = threading.BoundedSemaphore(MOST_REQUESTS)
        self._fixed: dict[str, int] = {}  # by artifact, what is known of how many rows it takes

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
        most_rows = room // max(row_bytes, 1)
        if plan.fixed_rows and max(plan.fixed_rows.values()) > most_rows:
            takes = max(plan.fixed_rows.values())
            detail = (
                f"{wanted.model} takes {takes} rows at once, and {most_rows} of these fit into a message to a device"
            )
            raise TooLargeError("row_too_large", f"{detail}: export it with a free batch")
        # A part may go to any lane, after it was given to another.
        schedule = Schedule(
            asked.rows, plan.lanes, self._dispatch.speeds, most_rows=min([most_rows, *plan.fixed_rows.values()])
        )
        exchange = self._dispatch.open()
        try:
            again = functools.partial(self._plan, fleet_id, wanted)
            return _Request(wanted, plan, asked, schedule, exchange, again).run()
        finally:
            exchange.close()

    def _plan(self, fleet_id: str, wanted: Wanted) -> Plan:
        with self._database.read() as session:
            devices = repository.serving(session, fleet_id, wanted.model, wanted.target, most=MOST_LANES)
            found = [
                (device.id, one["version"], one["digest"])
                for device in devices
                if FEATURE in device.facts.get("features", ())
                for one in device.serving
                if one["model"] == wanted.model and wanted.version in {None, one["version"]}
            ]
            staged = repository.shard_plan(session, fleet_id, wanted.model, wanted.version) if not found else None
            if staged is not None:
                return self._staged(session, fleet_id, wanted, *staged)
        if not found:
            what = wanted.model if wanted.version is None else f"{wanted.model}@{wanted.version}"
            silent = f" ({len(devices)} do, but can't be asked: old agents, or owners who forbid it)" if devices else ""
            detail = f"no device that is online serves {what}{silent}: roll it out, or widen `target`"
            raise ConflictError("no_device_serves", detail)
        counts = Counter(version for _, version, _ in found)
        version = max(counts, key=lambda one: (counts[one], one))  # answers of two versions are not mixed
        chosen = {device: digest for device, of, digest in found if of == version}
        lanes = tuple(Lane(f"{one} {wanted.model}@{version}", (one,)) for one in sorted(chosen))
        hops: dict[str, tuple[Hop, ...]] = {lane.id: (Hop(lane.devices[0], wanted.model, version),) for lane in lanes}
        taken = self._rows_taken(fleet_id, set(chosen.values()))
        fixed = {lane.id: rows for lane in lanes if (rows := taken[chosen[lane.devices[0]]])}
        return Plan(version, lanes, hops, fixed)

    def _rows_taken(self, fleet_id: str, digests: set[str]) -> dict[str, int]:
        """How many rows each of some artifacts takes at once; 0 for any number."""
        known = self._fixed  # other threads put others in its place, and never change it
        unknown = digests - known.keys()
        if unknown:
            with self._database.read() as session:
                manifests = {one: repository.manifest(session, fleet_id, one) for one in unknown}
            learnt = {one: found.fixed_rows if found is not None else 0 for one, found in manifests.items()}
            known = {**known, **learnt}
            self._fixed = known if len(known) <= KEPT_ARTIFACTS else learnt
        return known

    def _staged(
        self, session: Session, fleet_id: str, wanted: Wanted, version: str, stages: Sequence[Mapping[str, Any]]
    ) -> Plan:
        """The one lane of a model that is cut: its stages' devices, all at work at once.

        Raises:
            ConflictError: naming the devices that can't be asked.
        """
        ids = [str(one["device"]) for one in stages]
        devices = repository.online(session, fleet_id, ids, wanted.target)
        able = {one for one, device in devices.items() if FEATURE in device.facts.get("features", ())}
        away = [one for one in ids if one not in able]
        if away:
            detail = (
                f"{wanted.model}@{version} is cut into stages, and {', '.join(away)} can't be asked: wait until they "
                "are online or their stages have moved (`shoal model shards`), or widen `target`"
            )
            raise ConflictError("no_device_serves", detail)
        hops = tuple(
            Hop(str(one["device"]), str(one["model"]), str(one["version"]), _address(devices[str(one["device"])]))
            for one in stages
        )
        lane = Lane(f"{' '.join(ids)} {wanted.model}@{version}", tuple(ids), in_flight=IN_FLIGHT * len(ids))
        return Plan(version, (lane,), {lane.id: hops})


def _address(device: Device) -> str | None:
    """Where others on the device's LAN reach its local inference API, as its owner says."""
    return device.facts.get("inference_address") or None


class _Request:
    """One request while it is answered, by one thread."""

    def __init__(
        self,
        wanted: Wanted,
        plan: Plan,
        asked: Asked,
        schedule: Schedule,
        exchange: Exchange,
        plan_again: Callable[[], Plan],
    ) -> None:
        self._plan_again = plan_again
        self._wanted = wanted
        self._plan = plan
        self._asked = asked
        self._schedule = schedule
        self._exchange = exchange
        self._began = time.monotonic()
        self._deadline = self._began + wanted.timeout_s
        self._answers: dict[int, tuple[Tensor, ...]] = {}
        self._bytes = 0
        self._relayed = 0  # from one stage to the next, by this server
        self._wrong: dict[str, str] = {}

    def run(self) -> tuple[bytes, int | None]:
        while not self._schedule.done:
            now = time.monotonic()
            if now >= self._deadline:
                self._fail_late()
            for sending in self._schedule.send(now):
                self._send(sending)
            if self._schedule.stuck:
                if not self._plan.staged:
                    self._fail()
                self._take_new_route()
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
            "relayed": self._relayed,
            "devices": [
                {"device": device, "rows": one.rows, "left_out": one.out}
                for one in self._schedule.report()
                for device in one.lane.devices
            ],
        }
        return write_answer(parts, said, binary=self._asked.binary)

    def _take_new_route(self) -> None:
        """A stage was lost: go on with the rows that are left, when it serves on another device."""
        time.sleep(REPLAN_S)
        try:
            plan = self._plan_again()
        except (ConflictError, InvalidError):
            return  # until the deadline it may be there again
        if plan.version == self._plan.version and plan.staged:
            self._plan = Plan(plan.version, plan.lanes, self._plan.hops | plan.hops)
            for lane in plan.lanes:
                self._schedule.add(lane)

    def _send(self, sending: Sending) -> None:
        fixed = self._plan.fixed_rows.get(sending.lane.id, 0)
        body, header_length = self._asked.part(sending.first, sending.last, fixed)
        left_ms = max(1, int(1000 * (self._deadline - time.monotonic())))
        first, *rest = self._plan.hops[sending.lane.id]
        part = InferPart("", sending.attempt, first.model, body, header_length, first.version, left_ms, tuple(rest))
        self._pass(sending.id, sending.lane, first.device, part)

    def _pass(self, sending: int, lane: Lane, device: str, part: InferPart) -> None:
        if not self._exchange.send(device, lane.devices, sending, part):
            self._schedule.refuse(sending, time.monotonic(), UNSENT_S)

    def _relay(self, event: Answered, lane: Lane) -> None:
        """A stage's outputs to the next one: its device did not reach that itself."""
        answer, rows = event.answer, self._schedule.rows_of(event.sending)
        left = len(answer.route)
        hops = self._plan.hops[lane.id]
        if left >= len(hops) or answer.route != hops[-left:]:
            self._schedule.leave_out(lane.id, f"{event.device} answered with a route that it was not given")
            return
        try:
            body, header_length = as_request(answer.body, answer.header_length, rows)
        except TensorError as error:
            self._schedule.leave_out(lane.id, f"{event.device} answered what is no answer: {error}")
            return
        if len(body) > LIMITS.part_bytes:
            if not self._schedule.divide(event.sending):
                raise TooLargeError("row_too_large", f"{event.device}: what a single row becomes fits into no message")
            return
        following, *rest = answer.route
        left_ms = max(1, int(1000 * (self._deadline - time.monotonic())))
        part = InferPart(
            "", answer.attempt, following.model, body, header_length, following.version, left_ms, tuple(rest)
        )
        self._relayed += 1
        self._pass(event.sending, lane, following.device, part)

    def _heard(self, event: Answered) -> None:
        now, answer = time.monotonic(), event.answer
        lane = self._schedule.lane_of(event.sending)
        if lane is None:
            return
        if answer.status == 200 and answer.route:
            self._relay(event, lane)
        elif answer.status == 200:
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
            answered = self._plan.fixed_rows.get(lane.id, 0) or rows
            every, _ = read_answer(event.answer.body, event.answer.header_length, answered)
            outputs = tuple(one.cut(0, rows) for one in every) if answered > rows else every
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
