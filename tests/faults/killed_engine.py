"""A fleet server killed by SIGKILL right before and after each commit of a rollout: it must end as if it had not been.

One case is one rollout in a process of its own: engine, operator, and the devices' reports by the functions that the
server calls, on a real database. What devices know lies in a file, written before the server hears of
it, as on disks that live on. The killed process is started again, its lease run out, and must come to the end that the
rollout has without a kill; after every commit it is looked whether a device was told what it must not be.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Row, create_engine, event, select, text
from sqlalchemy.orm import Session

from agent.protocol.codec import decode
from agent.protocol.errors import WireErrorCode
from agent.protocol.histogram import bucket_of
from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.messages import (
    DeploymentReport,
    DesiredState,
    Failure,
    HostWindow,
    ModelWindow,
    Reported,
    TelemetryBatch,
)
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server import migrations, outbox
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.gateway.reports import Reports
from fleet_server.models import Deployment, Device, Lease, Rollout, Version
from fleet_server.rollouts import service
from fleet_server.rollouts.engine import LEASE, RolloutEngine
from fleet_server.telemetry import service as telemetry
from tests.databases import make_empty, postgresql, postgresql_programs
from tests.integration.test_rollout_judging import JudgedWorld
from tests.integration.test_rollout_rules import FACTS, SETTINGS

NAMES = "abcdefgh"
THIRDS = {"stages": [{"percent": 25}, {"percent": 50}, {"percent": 100}]}
ROUNDS = 120
USUAL_MS = 10.0
KILLED, UNFINISHED, WRONG = 9, 3, 4
Moment = tuple[int, str]  # the number of a commit, and "before" or "after" it


@dataclass(frozen=True)
class Script:
    """What one rollout is like.

    Attributes:
        strategy: of it.
        outcome: phase that ends a deployment of version 2, by device and attempt.
        latency_ms: of version 2.
        operator: what a person does, by the rollout and the decisions so far.
    """

    strategy: Mapping[str, Any]
    outcome: Callable[[str, int], Phase] = lambda _device, _attempt: Phase.ACTIVE
    latency_ms: float = USUAL_MS
    operator: Callable[[Session, Rollout, set[str]], None] = lambda _session, _rollout, _decisions: None


def pauses_and_aborts(session: Session, rollout: Rollout, decided: set[str]) -> None:
    """Pause in the second stage, resume, and take all back in the third."""
    if rollout.state == "running" and rollout.stage == 1 and "pause" not in decided:
        service.pause(session, rollout, "lunch", actor="test")
    elif rollout.state == "paused":
        service.resume(session, SETTINGS, rollout, actor="test")
    elif rollout.state == "running" and rollout.stage == 2:
        service.abort(session, SETTINGS, rollout, revert=True, actor="test")


def promotes(session: Session, rollout: Rollout, decided: set[str]) -> None:
    """Let the second stage begin, once."""
    if rollout.state == "running" and rollout.stage == 0 and "promote" not in decided:
        service.promote(session, SETTINGS, rollout, full=False, actor="test")


SLOWER = {"metric": "latency_p95_ratio", "above": 1.3, "min_samples": 50}
FAILING = {"metric": "failed_percent", "above": 20, "min_samples": 4}
SCRIPTS = {
    "a good version": Script({**THIRDS, "stop_when": [SLOWER, FAILING]}),
    "a version that does not load": Script(
        {**THIRDS, "stop_when": [FAILING]}, outcome=lambda device, _: Phase.FAILED if device in "bdfh" else Phase.ACTIVE
    ),
    "a version that devices take back": Script(
        {**THIRDS, "stop_when": [{**FAILING, "metric": "rolled_back_percent"}]},
        outcome=lambda device, _: Phase.ROLLED_BACK if device in "acegh" else Phase.ACTIVE,
    ),
    "a slower version": Script(
        {"stages": [{"percent": 50, "soak_s": 3600}, {"percent": 100}], "stop_when": [SLOWER]}, latency_ms=18.0
    ),
    "failures that are tried again": Script(
        {**THIRDS, "retry": {"attempts": 2, "wait_s": 0}, "stop_when": []},
        outcome=lambda device, attempt: Phase.FAILED if device in "ceh" and attempt == 0 else Phase.ACTIVE,
    ),
    "one at a time, and each stage let begin": Script(
        {"stages": [{"percent": 25}, {"percent": 100, "approval": True}], "caps": {"at_once": 1}}, operator=promotes
    ),
    "a pause, and an abort that reverts": Script({**THIRDS, "stop_when": []}, operator=pauses_and_aborts),
}


@dataclass
class Seen:
    """A deployment on a device's disk."""

    version: str
    phase: Phase
    attempt: int = 0


@dataclass
class Memory:
    """What lies on the disks of the devices."""

    sequences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 1))
    windows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    known: dict[str, dict[str, Seen]] = field(default_factory=lambda: {name: {} for name in NAMES})
    taken: dict[str, int] = field(default_factory=dict)  # how often a device was sent version 2


@dataclass(frozen=True)
class Ending:
    """What must be the same however often the server was killed.

    Attributes:
        state: of the rollout.
        stage: the last one that was open.
        runs: version by device, by what the device itself knows.
        phases: how each device's part ended, and after how many attempts.
        decisions: in their order.
    """

    state: str
    stage: int
    runs: dict[str, str]
    phases: dict[str, tuple[str, int]]
    decisions: list[str]


class Case:
    """One rollout in this process, from where the database and the memory are to its end."""

    def __init__(self, url: str, memory: Path, script: Script) -> None:
        self._database = Database(url)
        self._file = memory
        self._script = script
        self._memory = msgspec.json.decode(memory.read_bytes(), type=Memory)
        self._engine = RolloutEngine(self._database, SETTINGS)
        with self._database.read() as session:
            self._rollout = session.query(Rollout).join(Version, Version.id == Rollout.version_id).filter(
                Version.name == "2"
            ).one().id  # fmt: skip

    def run(self) -> Ending | None:
        """Go on to the end; None when there is none."""
        for name in NAMES:
            self._speaks(name)
        quiet = 0
        for _ in range(ROUNDS):
            self._operates()
            self._engine.tick()
            moved = [self._moves(name) for name in NAMES]
            with self._database.read() as session:
                ended = session.get_one(Rollout, self._rollout).finished_at is not None
            quiet = quiet + 1 if ended and not any(moved) else 0
            if quiet == 2:
                return self._ending()
        return None

    def _operates(self) -> None:
        """A person who does not know whether a command was heard looks first."""
        with self._database.write() as session:
            rollout = session.get_one(Rollout, self._rollout, with_for_update=True)
            self._script.operator(session, rollout, {one["decision"] for one in rollout.verdicts})

    def _moves(self, name: str) -> bool:
        """Let a device go one step towards what it was told, and say so; whether it did."""
        told = self._told(name)
        known = self._memory.known[name]
        wanted = {one.deployment_id: one.read_manifest().version for one in told.deployments} if told else {}
        before = {key: seen.phase for key, seen in known.items()}
        for key, version in wanted.items():
            if key not in known:
                attempt = self._memory.taken.get(name, 0)
                if version == "2":
                    self._memory.taken[name] = attempt + 1
                known[key] = Seen(version, Phase.DOWNLOADING, attempt)
                continue
            seen = known[key]
            if seen.phase is Phase.PROBATION:
                ends = self._script.outcome(name, seen.attempt) if seen.version == "2" else Phase.ACTIVE
                seen.phase = ends if ends is Phase.ROLLED_BACK else Phase.ACTIVE
            elif seen.phase not in SETTLED:
                ends = self._script.outcome(name, seen.attempt) if seen.version == "2" else Phase.ACTIVE
                seen.phase = Phase.FAILED if ends is Phase.FAILED else Phase.PROBATION
        active = [key for key, seen in known.items() if seen.phase is Phase.ACTIVE and key in wanted]
        for key in list(known):
            if key not in wanted and (active or not wanted or known[key].phase is not Phase.ACTIVE):
                del known[key]
        if {key: seen.phase for key, seen in known.items()} != before:
            self._speaks(name)
            return True
        self._measures(name)
        return False

    def _told(self, name: str) -> DesiredState | None:
        topic = device_topic(name, DeviceTopic.DESIRED)
        with self._database.read() as session:
            found = [one for one in outbox.pending(session, limit=1000) if one.topic == topic]
        assert len(found) <= 1, "one retained message a topic"
        return decode(found[0].payload, DesiredState) if found else None

    def _speaks(self, name: str) -> None:
        """Write down where a device is, then report it."""
        self._memory.sequences[name] += 1
        self._keep()
        told = self._told(name)
        reported = Reported(
            SPOKEN, "boot", self._memory.sequences[name], told.revision if told else 0, FACTS,
            tuple(
                DeploymentReport(
                    key, "m", seen.version, seen.version * 64, seen.phase,
                    failure=Failure(WireErrorCode.LOAD_FAILED, "it does not load")
                    if seen.phase in {Phase.FAILED, Phase.ROLLED_BACK} else None,
                )
                for key, seen in self._memory.known[name].items()
            ),
        )  # fmt: skip
        Reports(self._database, SETTINGS).take([(name, reported)])

    def _measures(self, name: str) -> None:
        """Send a window of fifty requests, where the script is about what devices measure."""
        running = [(key, seen) for key, seen in self._memory.known[name].items() if seen.phase is Phase.ACTIVE]
        if not running or self._script.latency_ms == USUAL_MS:
            return
        ((key, seen),) = running[-1:]
        self._memory.windows[name] += 1
        self._keep()
        ms = self._script.latency_ms if seen.version == "2" else USUAL_MS
        window = ModelWindow(
            "m", seen.version, seen.version * 64, key, "cpu", requests=50, latency={bucket_of(ms / 1000): 50}
        )
        now = utc_now()
        batch = TelemetryBatch(
            SPOKEN, "t", self._memory.windows[name], now.timestamp() - 30, now.timestamp(), (window,), HostWindow()
        )
        with self._database.write() as session:
            telemetry.store_batch(session, name, batch, now)

    def _keep(self) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_bytes(msgspec.json.encode(self._memory))
        beside.replace(self._file)

    def _ending(self) -> Ending:
        with self._database.read() as session:
            rollout = session.get_one(Rollout, self._rollout)
            last: dict[str, Deployment] = {}
            for one in session.query(Deployment).filter_by(rollout_id=rollout.id, revert_of="").all():
                if one.device_id not in last or one.attempt > last[one.device_id].attempt:
                    last[one.device_id] = one
            return Ending(
                rollout.state,
                rollout.stage,
                {
                    name: next((one.version for one in known.values() if one.phase is Phase.ACTIVE), "")
                    for name, known in self._memory.known.items()
                },
                {name: (one.phase, one.attempt) for name, one in sorted(last.items())},
                [one["decision"] for one in rollout.verdicts],
            )


def told_wrongly(stages: Mapping[str, int], deployments: Sequence[Row[Any]]) -> str | None:
    """What no device may ever be told, in a sentence; None while none is."""
    told = [one for one in deployments if one.desired]
    for one in told:
        if one.stage > stages[one.rollout_id]:
            return f"{one.device_id} is told of stage {one.stage + 1} in stage {stages[one.rollout_id] + 1}"
    held = Counter((one.device_id, one.model_id) for one in told)
    twice = [device for (device, _), count in held.items() if count > 1]
    return f"{twice} are told two versions at once" if twice else None


ROLLOUTS = select(Rollout.id, Rollout.state, Rollout.stage, Rollout.verdicts)
DEPLOYMENTS = select(
    Deployment.id, Deployment.rollout_id, Deployment.device_id, Deployment.model_id,
    Deployment.stage, Deployment.phase, Deployment.desired,
).order_by(Deployment.id)  # fmt: skip


class Commits:
    """Counts this process's commits, and ends it at one."""

    def __init__(self, url: str, kill: Moment | None) -> None:
        self._kill = kill
        self._count = 0
        self._looking = Database(url)
        self.changing: list[int] = []  # commits that changed the rollout or its deployments
        self._state = self._look()
        event.listen(Session, "before_commit", self._before)
        event.listen(Session, "after_commit", self._after)

    def _before(self, _session: Session) -> None:
        self._count += 1
        if self._kill == (self._count, "before"):
            os.kill(os.getpid(), signal.SIGKILL)

    def _after(self, _session: Session) -> None:
        if self._kill == (self._count, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        state = self._look()
        if state != self._state:
            self.changing.append(self._count)
            self._state = state

    def _look(self) -> list[Any]:
        with self._looking.engine.connect() as connection:
            rollouts = connection.execute(ROLLOUTS).all()
            deployments = connection.execute(DEPLOYMENTS).all()
        wrong = told_wrongly({one.id: one.stage for one in rollouts}, deployments)
        assert wrong is None, wrong
        return [
            [(one.id, one.state, one.stage, len(one.verdicts)) for one in rollouts],
            [(one.id, one.phase, one.desired) for one in deployments],
        ]


@dataclass(frozen=True)
class Ran:
    """What a process came to: how it ended, and what it found."""

    status: int
    ending: Ending | None = None
    changing: tuple[int, ...] = ()
    text: str = ""


def in_process(url: str, folder: Path, script: Script, kill: Moment | None) -> Ran:
    """Run a case in a child; it ends by itself, or by the signal it sends itself."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status, said = WRONG, Ran(WRONG)
        try:
            commits = Commits(url, kill)
            ending = Case(url, folder / "memory", script).run()
            status = 0 if ending else UNFINISHED
            said = Ran(status, ending, tuple(commits.changing))
        except BaseException:
            said = Ran(WRONG, text=traceback.format_exc())
        finally:
            answer.write_bytes(msgspec.json.encode(said))
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Ran(KILLED)
    return msgspec.json.decode(answer.read_bytes(), type=Ran)


class Bench:
    """Databases that are all alike: made once, copied for each case."""

    def __init__(self, folder: Path, server: str | None) -> None:
        self._folder = folder
        self._server = server
        self._made = 0
        self._empty = self._new()
        migrations.upgrade(self._empty)
        database = Database(self._empty)
        with database.write() as session:
            make_empty(session)
        database.dispose()

    def prepared(self, strategy: Mapping[str, Any]) -> str:
        """The address of one in which eight devices run version 1 and a rollout of version 2 was made."""
        url = self.copy(self._empty)
        database = Database(url)
        world = JudgedWorld(database)
        for name in NAMES[4:]:
            world.report(name)
        for version, wanted in (("1", {"stages": [{"percent": 100}]}), ("2", strategy)):
            rollout = world.create(version, strategy=wanted)
            if version == "1":
                for name in NAMES:
                    world.goes(name, Phase.ACTIVE, "1")
                    world.measured(name, "1")
                assert world.tick(rollout).state == "succeeded"
        database.dispose()
        return url

    def memory(self, url: str) -> bytes:
        """What devices of a prepared database know."""
        database = Database(url)
        memory = Memory()
        with database.read() as session:
            for one in session.query(Deployment).filter_by(phase="active").all():
                memory.known[one.device_id][one.id] = Seen("1", Phase.ACTIVE)
            for device in session.query(Device).all():
                memory.sequences[device.id] = device.reported_sequence
        database.dispose()
        return msgspec.json.encode(memory)

    def copy(self, url: str) -> str:
        """Another one like it."""
        new = self._new(like=url)
        if self._server is None:
            shutil.copyfile(url.removeprefix("sqlite:///"), new.removeprefix("sqlite:///"))
        return new

    def drop(self, url: str) -> None:
        """Let one be gone."""
        if self._server is None:
            for name in (self._folder).glob(f"{Path(url).name}*"):
                name.unlink()
            return
        self._administrate(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def _new(self, like: str | None = None) -> str:
        self._made += 1
        if self._server is None:
            return f"sqlite:///{self._folder / f'{self._made}.db'}"
        name = f"case{self._made}"
        self._administrate(f"CREATE DATABASE {name}" + (f" TEMPLATE {like.rpartition('/')[2]}" if like else ""))
        return f"{self._server.rpartition('/')[0]}/{name}"

    def _administrate(self, statement: str) -> None:
        assert self._server is not None
        engine = create_engine(self._server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


def expire_lease(url: str) -> None:
    """As when its time had passed since the server died."""
    database = Database(url)
    with database.write() as session:
        lease = session.get(Lease, LEASE)
        if lease is not None:
            session.delete(lease)
    database.dispose()


def cases_of(script: Script, bench: Bench, folder: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Every commit of a rollout that changes where it is, on both sides of it; the others once."""
    prepared = bench.prepared(script.strategy)
    memory = bench.memory(prepared)

    def ran(kill: Moment | None) -> tuple[Ran, str]:
        url = bench.copy(prepared)
        (folder / "memory").write_bytes(memory)
        return in_process(url, folder, script, kill), url

    whole, url = ran(None)
    bench.drop(url)
    assert whole.ending is not None, whole.text or "the rollout did not end without a kill"
    expected = whole.ending

    def case(kill: Moment) -> str | None:
        killed, url = ran(kill)
        try:
            if killed.status != KILLED:
                return killed.text or "it was not killed: it takes fewer commits than without"
            expire_lease(url)
            after = in_process(url, folder, script, None)
            if after.ending is None:
                return after.text or "the rollout did not end"
            return None if after.ending == expected else f"ended as {after.ending}, not as {expected}"
        finally:
            bench.drop(url)

    for number in whole.changing:
        for side in ("before", "after"):
            yield f"{side} commit {number}", partial(case, (number, side))


_OPEN = contextlib.ExitStack()  # until this process ends: cases are carried out after they were listed
atexit.register(_OPEN.close)


@cache
def bench(on_postgresql: bool) -> tuple[Bench, Path]:
    """Where databases are made, and the folder of the rest."""
    folder = Path(_OPEN.enter_context(tempfile.TemporaryDirectory(prefix="shoal-engine-")))
    return Bench(folder, _OPEN.enter_context(postgresql(durable=False)) if on_postgresql else None), folder


def row(script: Script, *, on_postgresql: bool) -> Callable[[int], Iterator[tuple[str, Callable[[], str | None]]]]:
    """A row of the table of faults."""

    def cases(_seed: int) -> Iterator[tuple[str, Callable[[], str | None]]]:
        if not on_postgresql or postgresql_programs():
            yield from cases_of(script, *bench(on_postgresql))

    return cases


ROWS = {
    f"server killed, {database}: {name}": row(script, on_postgresql=database == "PostgreSQL")
    for name, script in SCRIPTS.items()
    for database in ("SQLite", "PostgreSQL")
}
