"""Server and device through arbitrary interleavings of messages, losses, repetitions, damage and ends of the agent.

The server's rules work on a real database, the device is the real supervisor on real files; the link, the worker and
the clock are made up, and nothing happens but what the machine says. At the end the link holds: then the device must
come to run what the server wants, or have said why not, and the server must know what runs.
"""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import agent.condition
import agent.deployments
import agent.inference
import agent.reporter
import agent.supervisor
import agent.telemetry.sender
from agent.config import Config
from agent.mqtt import LinkUp, MqttChunk, MqttMessage
from agent.protocol.codec import encode
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import RuntimeFacts
from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.messages import Need, Reported
from agent.protocol.topics import DeviceTopic, broadcast_topic, device_topic
from agent.protocol.version import SPOKEN
from agent.serving.ipc import Load, Loaded
from agent.supervisor import Supervisor
from agent.worker_process import WorkerDied
from fleet_server import migrations, outbox
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.enrolment.service import Authority
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.handlers import Handlers
from fleet_server.gateway.inbox import Message
from fleet_server.models import Device, Model, Rollout, Variant, Version
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import desired, repository, service
from fleet_server.rollouts.engine import advance
from fleet_server.rollouts.schemas import RolloutCreate
from fleet_server.samples.receiving import Receiving
from fleet_server.settings import Settings
from fleet_server.trust import service as trust
from fleet_server.trust.ca import FleetCa
from tests.databases import make_empty
from tests.faults import device
from tests.reporting import record_report

VERSIONS = ("1", "2", "3", "4")
BAD = "4"  # it does not load
FACTS = msgspec.structs.replace(device.FACTS, runtimes=(RuntimeFacts("onnx", "onnxruntime", "1", ("cpu",)),))
HEALING_TURNS = 400


class Ended(BaseException):
    """The agent ends here, as by SIGKILL: nothing catches it."""


class Clock:
    """A clock that goes when it is told to, and may be set."""

    def __init__(self) -> None:
        self.steady, self.wall = 1000.0, 1.7e9

    def monotonic(self) -> float:
        return self.steady

    def time(self) -> float:
        return self.wall


@cache
def template() -> tuple[Path, Path]:
    """A database with a model, its signed versions and one device, and the server's state folder; made once."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-convergence-"))
    url = f"sqlite:///{folder / 'shoal.db'}"
    migrations.upgrade(url)
    database = Database(url)
    server = Settings(state_dir=folder / "server")
    with database.write() as session:
        make_empty(session)
    with database.write() as session:
        profile = devices.create_profile(session, DEFAULT_FLEET, ProfileCreate(name="p", runtime="onnx"), actor="test")
        model = Model(fleet_id=DEFAULT_FLEET, name="m")
        session.add(model)
        session.flush()
        paths = []
        for name in VERSIONS:
            version = Version(fleet_id=DEFAULT_FLEET, model_id=model.id, name=name, inputs=[], outputs=[])
            session.add(version)
            session.flush()
            variant = Variant(
                fleet_id=DEFAULT_FLEET, version_id=version.id, profile_id=profile.id, profile_spec=profile.spec,
                state="ready", measurements={"accuracy": 0.9},
            )  # fmt: skip
            session.add(variant)
            session.flush()
            found = msgspec.structs.replace(device.manifest("m", name), variant_id=variant.id)
            variant.digest, variant.size, variant.manifest = found.digest, found.size, msgspec.to_builtins(found)
            paths.append(trust.want(session, DEFAULT_FLEET, found))
        session.flush()
        trust.require_signed(session, server, DEFAULT_FLEET, paths, "m")
        hello = Reported(SPOKEN, "first", 1, 0, FACTS)
        record_report(session, device.NAME, hello, dt.datetime.now(dt.UTC))
    database.dispose()
    FleetCa.open(folder / "ca", DEFAULT_FLEET)
    return folder / "shoal.db", folder


CONTENTS = {device.manifest("m", name).digest: device.content("m", name) for name in VERSIONS}


class Worker(device.FakeWorker):
    """Answers when it is told to; refuses the bad version."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: list[Any] = []
        super().__init__(self.answers.append, world)  # type: ignore[arg-type]

    def start(self) -> None:
        self.end()
        self.alive = True
        super().start()

    def end(self) -> None:
        """As the kernel ends it: what it was about to say is lost, and what it is told."""
        self.alive = False
        self.answers.clear()
        self.untold.clear()
        self.loaded.clear()
        self.serving.clear()

    def send(self, message: Any) -> bool:
        self.world.boundary()
        if not self.alive:
            return False
        if isinstance(message, Load) and message.manifest.version == BAD:
            self._answer(Loaded(message.request_id, code=WireErrorCode.LOAD_FAILED, detail="it does not load"))
            return True
        return super().send(message)


class Link:
    """What is sent waits until the machine delivers it."""

    epoch = 0

    def __init__(self, world: World) -> None:
        self.world = world

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def keep_by(self, keep: Callable[[MqttChunk], object | None]) -> None:
        """Chunks here are too small for the link to work them off."""

    @property
    def connected(self) -> bool:
        return self.world.up

    def publish(self, leaf: DeviceTopic, payload: bytes, *, retain: bool = False) -> None:
        self.world.boundary()
        if self.world.up:
            self.world.said(leaf, payload)

    def listen_to_broadcast(self, digest: str) -> None:
        pass

    def stop_listening(self, digest: str) -> None:
        pass

    def say_need(self, need: Need) -> None:
        self.publish(DeviceTopic.NEED, encode(need))


class Needs(Delivery):
    """Sends what is needed at once."""

    def __init__(self, world: World) -> None:
        self.world = world

    def hear(self, device_id: str, need: Need, chunks: int) -> None:
        self.world._need(device_id, need, chunks)

    def forget(self, device_id: str) -> None:
        pass


class World:
    """One server, one device, and what is on its way between them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-convergence-"))
        database, server = template()
        shutil.copy(database, self.folder / "shoal.db")
        self.database = Database(f"sqlite:///{self.folder / 'shoal.db'}")
        self.settings = Settings(state_dir=server / "server", probation_s=3.0)
        authority = Authority(FleetCa.open(server / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
        self.handlers = Handlers(
            self.database,
            self.settings,
            Needs(self),
            authority,
            Conduct(self.database),
            Receiving(self.database, ArtifactStore.open(None, folder=self.folder / "samples"), self.folder),
            lambda *_: None,
        )
        self.clock = Clock()
        self.up = False
        self.left: int | None = None  # boundaries until the agent ends
        self.to_server: list[Message] = []
        self.to_device: list[MqttMessage] = []
        self.retained: MqttMessage | None = None
        self.violations: list[str] = []
        self.worker = Worker(self)
        self.start_agent()

    # -- what the worker's log says; it takes the world for its log

    step = 0

    def say(self, **fields: Any) -> None:
        if "violation" in fields:
            self.violations.append(fields["violation"])

    def wanted(self) -> dict[str, tuple[str, str]]:
        return {}

    # -- the agent

    def start_agent(self) -> None:
        self.left = None
        verifier = lambda *_arguments, answered, **_options: device.FakeVerifier(answered)  # noqa: E731
        patches = {
            "WorkerProcess": lambda _config, put: self.worker,
            "MqttLink": lambda *_arguments: Link(self),
            "Verifier": verifier,
        }
        with mock.patch.multiple(agent.supervisor, **patches):
            self.agent = Supervisor(Config(device.NAME, self.folder / "device", disk_floor_mb=0.0))
        self.agent._reporter._facts = FACTS
        self.agent.begin()

    def boundary(self) -> None:
        """Something is about to leave the agent: it may end here."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Ended

    def end_agent(self) -> None:
        """As SIGKILL: files are as they are, the worker dies, what was on its way to the device is lost."""
        self.left = None
        self.to_device.clear()
        self.agent._fetcher.stop()
        self.agent._journal.close()
        self.agent._spool.close()
        self.agent._bundles.stop()  # or its thread would look for sticks until the tests end
        self.start_agent()
        if self.up:
            self.link_up()

    def turn(self) -> None:
        try:
            self.agent.turn(0)
            for _ in range(20):
                if self.agent._events.empty():
                    break
                self.agent.turn(0)
        except Ended:
            self.end_agent()

    def answer(self) -> None:
        """The worker's oldest word reaches the supervisor."""
        if self.worker.answers:
            told = self.worker.answers.pop(0)
            self.worker.untold = [one for one in self.worker.untold if one is not told[1]]
            self.agent._events.put(told)
            self.turn()

    # -- the link

    def link_up(self) -> None:
        self.up = True
        self.agent._events.put(LinkUp(0))
        if self.retained is not None:
            self.to_device.append(self.retained)

    def link_down(self) -> None:
        self.up = False
        self.to_server.clear()
        self.to_device.clear()

    def said(self, leaf: DeviceTopic, payload: bytes) -> None:
        if leaf is DeviceTopic.REPORTED:
            reported = msgspec.json.decode(payload, type=Reported)
            says = {one.model: one.digest for one in reported.serving}
            runs = {model: one.digest for model, one in self.worker.serving.items()}
            if says != runs and not self.worker.untold:
                self.violations.append(f"reported {says}, and runs {runs}")
        if leaf in {DeviceTopic.REPORTED, DeviceTopic.NEED}:
            self.to_server.append(Message(device_topic(device.NAME, leaf), payload))

    def hear(self, message: Message) -> None:
        """The server takes a message."""
        self.handlers.handle(message)
        self._publish()

    def _publish(self) -> None:
        with self.database.write() as session:
            found = outbox.pending(session, limit=100)
            outbox.acknowledge(session, [one.id for one in found])
        for one in found:
            message = MqttMessage(one.topic, one.payload)
            if one.retain:
                self.retained = message
            if self.up:
                self.to_device.append(message)

    def _need(self, _device: str, need: Need, _chunks: int) -> None:
        for span in need.missing:
            for chunk in range(span.first, span.last + 1):
                payload = CONTENTS[need.digest][chunk * device.CHUNK : (chunk + 1) * device.CHUNK]
                self.to_device.append(MqttMessage(broadcast_topic(need.digest, chunk), payload))

    def deliver(self, message: MqttMessage) -> None:
        """The device takes a message."""
        self.agent._events.put(message)
        self.turn()

    # -- the server

    def roll_out(self, version: str) -> None:
        wanted = RolloutCreate.model_validate(
            {
                "version": f"m@{version}",
                "target": {"all": True},
                "strategy": {"stages": [{"percent": 100}]},
                "allow_unproven": True,
                "on_busy": "supersede",
            }
        )
        with self.database.write() as session:
            service.create(session, self.settings, DEFAULT_FLEET, wanted, actor="test")
        self._publish()

    def advance(self) -> None:
        """The engine looks at every rollout."""
        with self.database.write() as session:
            for rollout in session.query(Rollout).filter(Rollout.state.in_(["running", "reverting"])).all():
                advance(session, self.settings, rollout)
        self._publish()

    def settled(self) -> bool:
        """Whether nothing is left to be done, as the server sees it."""
        with self.database.read() as session:
            row = session.get_one(Device, device.NAME)
            phases = [Phase(one.phase) for one in repository.desired(session, device.NAME)]
            open_ones = session.query(Rollout).filter(Rollout.state.in_(["running", "reverting"])).count()
            return row.desired_revision == row.reported_revision and set(phases) <= SETTLED and not open_ones

    def heal(self) -> None:
        """The link holds, the worker answers, and time goes on."""
        self.left = None
        if not self.up:
            self.link_up()
        for _ in range(HEALING_TURNS):
            self.clock.steady += 0.5
            self.clock.wall += 0.5
            self.turn()
            while self.worker.answers:
                self.answer()
            while self.to_server:
                self.hear(self.to_server.pop(0))
            while self.to_device:
                self.deliver(self.to_device.pop(0))
            self.advance()
            if self.settled() and not (self.to_server or self.to_device or self.worker.answers):
                self.agent._reporter.changed()
                self.turn()
                while self.to_server:
                    self.hear(self.to_server.pop(0))
                if self.settled() and not self.to_device:
                    return
        raise AssertionError(f"it did not converge in {HEALING_TURNS} turns: {self.picture()}")

    def picture(self) -> dict[str, Any]:
        with self.database.read() as session:
            wanted = [(one.id[-4:], one.phase, one.failure) for one in repository.desired(session, device.NAME)]
            row = session.get_one(Device, device.NAME)
            return {
                "server wants": wanted,
                "revisions": (row.desired_revision, row.reported_revision),
                "device": {key[-4:]: one.phase.value for key, one in self.agent._updater.records.items()},
                "serving": {model: one.version for model, one in self.worker.serving.items()},
                "waiting": self.agent._deployments._waiting,
                "rollouts": [
                    (
                        one.id[-4:],
                        one.state,
                        [
                            (d.id[-4:], d.phase, d.desired, d.revert_of[-4:])
                            for d in repository.deployments(session, one.id)
                        ],
                        one.verdicts[-1:],
                    )
                    for one in session.query(Rollout).all()
                ],
            }

    def check(self) -> None:
        """What the server wants runs, and what runs is known."""
        with self.database.read() as session:
            runs = {model: one.digest for model, one in self.worker.serving.items()}
            row = session.get_one(Device, device.NAME)
            assert {one["model"]: one["digest"] for one in row.serving} == runs, self.picture()
            for deployment in repository.desired(session, device.NAME):
                if deployment.phase == Phase.ACTIVE.value:
                    wanted = desired.manifest_of_variant(session.get_one(Variant, deployment.variant_id))
                    assert runs.get("m") == wanted.digest, self.picture()
            if not repository.desired(session, device.NAME):
                assert not runs, self.picture()

    def close(self) -> None:
        self.agent.end()
        self.database.dispose()
        shutil.rmtree(self.folder, ignore_errors=True)


class Convergence(RuleBasedStateMachine):
    """Whatever happens, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        clock = Clock()
        keepers_of_time = (
            agent.supervisor, agent.condition, agent.deployments, agent.inference, agent.reporter,
            agent.telemetry.sender,
        )  # fmt: skip
        with ExitStack() as patches:  # undone where there is no world: else later tests would wait for this clock
            for module in keepers_of_time:
                patches.enter_context(mock.patch.object(module, "time", clock))
            self.world = World()
            self.patches = patches.pop_all()
        self.world.clock = clock

    @rule(version=st.sampled_from(VERSIONS))
    def roll_out(self, version: str) -> None:
        self.world.roll_out(version)

    @rule()
    def engine(self) -> None:
        self.world.advance()

    @precondition(lambda self: self.world.to_server)
    @rule(place=st.integers(0, 3), fate=st.sampled_from(["whole", "whole", "whole", "twice", "lost"]))
    def to_server(self, place: int, fate: str) -> None:
        message = self.world.to_server.pop(min(place, len(self.world.to_server) - 1))
        for _ in range({"whole": 1, "twice": 2, "lost": 0}[fate]):
            self.world.hear(message)

    @precondition(lambda self: self.world.to_device)
    @rule(
        place=st.integers(0, 6),
        fate=st.sampled_from(["whole", "whole", "whole", "twice", "lost", "damaged"]),
        count=st.integers(1, 5),
    )
    def to_device(self, place: int, fate: str, count: int) -> None:
        for _ in range(min(count, len(self.world.to_device))):
            if not self.world.to_device:
                return  # the agent ended meanwhile
            message = self.world.to_device.pop(min(place, len(self.world.to_device) - 1))
            if fate == "damaged" and "/b/" in message.topic:
                message = MqttMessage(message.topic, message.payload[::-1])
            for _ in range({"twice": 2, "lost": 0}.get(fate, 1)):
                self.world.deliver(message)

    @precondition(lambda self: self.world.worker.answers)
    @rule()
    def worker_answers(self) -> None:
        self.world.answer()

    @rule(seconds=st.sampled_from([0.2, 1.5, 4.0, 400.0]), set_by=st.sampled_from([0.0, 0.0, 1e8, -1e8]))
    def time_goes_on(self, seconds: float, set_by: float) -> None:
        self.world.clock.steady += seconds
        self.world.clock.wall += seconds + set_by
        self.world.turn()

    @rule()
    def link_goes_up_or_down(self) -> None:
        if self.world.up:
            self.world.link_down()
        else:
            self.world.link_up()
        self.world.turn()

    @rule(boundaries=st.integers(0, 6))
    def agent_will_end(self, boundaries: int) -> None:
        self.world.left = boundaries

    @rule()
    def agent_ends(self) -> None:
        self.world.end_agent()

    @rule()
    def worker_ends(self) -> None:
        self.world.agent._events.put(WorkerDied(self.world.worker.generation))
        self.world.worker.end()
        self.world.turn()

    @rule(pick=st.integers(0, 5))
    def disk_damages_a_file(self, pick: int) -> None:
        files = sorted(path for path in (self.world.folder / "device" / "artifacts").iterdir() if path.is_file())
        if files:
            path = files[pick % len(files)]
            path.write_bytes(path.read_bytes()[:-1] + b"!")

    @invariant()
    def nothing_happened_that_must_never_happen(self) -> None:
        assert self.world.violations == []

    def teardown(self) -> None:
        try:
            if not self.world.violations:
                self.world.heal()
                self.world.check()
                assert self.world.violations == []
        finally:
            self.world.close()
            self.patches.close()


class Longer(Convergence):
    """The long form."""


HURRY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
Convergence.TestCase.settings = settings(max_examples=25, stateful_step_count=35, **HURRY)
Longer.TestCase.settings = settings(max_examples=400, stateful_step_count=50, **HURRY)


class TestConvergence(Convergence.TestCase):
    """Some dozens of histories."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestConvergenceForLong(Longer.TestCase):
    """Some hundreds."""
