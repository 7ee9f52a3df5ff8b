"""A simulated device in simulated time: what it says, when, and that it says the same with every run of a seed."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Callable

import msgspec
import pytest

from agent.protocol.codec import decode, encode
from agent.protocol.commands import Command, CommandAnswer, CommandArguments, CommandPhase
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import TRANSITIONS, Phase
from agent.protocol.manifest import DataFile, Manifest, ModelFormat, Precision, RuntimeName, TensorSpec, manifest_bytes
from agent.protocol.messages import (
    DesiredDeployment,
    DesiredState,
    Need,
    Presence,
    ProbationPolicy,
    Reported,
    TelemetryAck,
    TelemetryBatch,
    Trial,
    TrialPhase,
)
from agent.protocol.samples import (
    SampleAck,
    SampleLine,
    SamplePiece,
    SampleRequest,
    Sampling,
    UploadPhase,
    UploadReport,
)
from agent.protocol.topics import DeviceTopic, broadcast_topic, device_topic, repair_topic
from agent.protocol.version import SPOKEN
from fleet_server.simulator.behaviours import read
from fleet_server.simulator.device import SimulatedDevice
from fleet_server.simulator.outputs import Connect, Cut, Listen, Output, Say
from fleet_server.simulator.population import populate

NOON = 1_800_000_000.0
TENSOR = TensorSpec("x", "float32", (-1, 8))
WATCH = ProbationPolicy(seconds=5.0)
PLAIN = "classes: [{name: pi, profile: raspberry-pi-5, requests: {per_s: 20}%s}]"


def manifest(version: str, **fields: object) -> Manifest:
    plain = Manifest(
        digest=version[0] * 64, size=1_000_000, chunk_size=262_144, model="m", version=version, variant_id="v",
        profile="raspberry-pi-5", format=ModelFormat.ONNX, runtime=RuntimeName.ONNX, precision=Precision.FP32,
        inputs=(TENSOR,), outputs=(TENSOR,), providers=("cpu",),
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


class Driven:
    """A device whose time is driven, and what it wanted done until now."""

    def __init__(self, more: str = "", effects: str = "", *, seed: int = 1, stored: bool = True) -> None:
        behaviours = read(PLAIN % more + (f"\neffects: [{effects}]" if effects else ""))
        (traits,) = populate(behaviours, 1, seed)
        self.now = NOON
        self.device = SimulatedDevice(traits, behaviours.effects, seed, "run", NOON)
        self.outputs: list[Output] = []
        self.stored = stored  # the server acknowledges telemetry
        self.revision = 0
        self.take(self.device.start)
        self.connect()

    def take(self, event: Callable[[float], list[Output]]) -> None:
        given = event(self.now)
        self.outputs += given
        for one in given:
            if self.stored and isinstance(one, Say) and isinstance(one.message, bytes):
                batch = decode(one.message, TelemetryBatch)
                self.hears(DeviceTopic.TELEMETRY_ACK, TelemetryAck(batch.spool_id, (batch.sequence,)))

    def connect(self) -> None:
        self.take(self.device.link_up)

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.device.next_at <= end:
            self.now = max(self.now, self.device.next_at)
            self.take(self.device.tick)
            if self.outputs and isinstance(self.outputs[-1], Connect):
                self.connect()
        self.now = end

    def hears(self, leaf: DeviceTopic, message: DesiredState | TelemetryAck | Command | SampleAck) -> None:
        topic = device_topic(self.device.device_id, leaf)
        self.take(lambda now: self.device.message(topic, encode(message), now))

    def wants(self, *deployments: tuple[str, Manifest], trials: tuple[Trial, ...] = ()) -> None:
        """The server desires these, by id."""
        self.revision += 1
        wanted = tuple(
            DesiredDeployment(name, msgspec.Raw(manifest_bytes(one)), probation=WATCH) for name, one in deployments
        )
        self.hears(DeviceTopic.DESIRED, DesiredState(SPOKEN, "default", self.revision, wanted, 10.0, trials))

    def said(self, leaf: DeviceTopic) -> list[bytes]:
        found = [one.message for one in self.outputs if isinstance(one, Say) and one.leaf is leaf]
        return [one if isinstance(one, bytes) else encode(one) for one in found]

    @property
    def reports(self) -> list[Reported]:
        return [decode(one, Reported) for one in self.said(DeviceTopic.REPORTED)]

    @property
    def batches(self) -> list[TelemetryBatch]:
        return [decode(one, TelemetryBatch) for one in self.said(DeviceTopic.TELEMETRY)]

    @property
    def serves(self) -> list[str]:
        return [one.version for one in self.reports[-1].serving]

    def phases(self, name: str) -> list[Phase]:
        """Those that were reported of a deployment, one after another."""
        found = [one.phase for report in self.reports for one in report.deployments if one.deployment_id == name]
        return [one for number, one in enumerate(found) if number == 0 or found[number - 1] is not one]


def test_it_says_who_it_is_before_anything_else() -> None:
    it = Driven()
    assert it.outputs[0] == Connect("run-1")
    presence, reported = it.outputs[1:3]
    assert presence == Say(DeviceTopic.PRESENCE, Presence(online=True, boot_id="run-1"), retain=True)
    assert isinstance(reported, Say)
    assert isinstance(reported.message, Reported)
    assert (reported.message.revision, reported.message.facts.arch) == (0, "aarch64")


def test_a_deployment_goes_through_every_phase_to_active() -> None:
    it = Driven()
    it.wants(("d1", manifest("1")))
    it.passes(60)
    phases = it.phases("d1")
    assert phases[-1] is Phase.ACTIVE
    assert {Phase.DOWNLOADING, Phase.LOADING, Phase.PROBATION} <= set(phases)
    for before, after in itertools.pairwise(phases):
        assert after in TRANSITIONS[before] or before is Phase.DOWNLOADING
    last = it.reports[-1].deployments[0]
    assert last.sources == {"simulated": 1_000_000}
    assert last.received_bytes == 0
    assert last.probation is not None
    assert last.probation.exercised
    assert last.probation.errors == 0
    assert it.serves == ["1"]
    sequences = [one.sequence for one in it.reports]
    assert sequences == sorted(set(sequences))
    assert it.reports[-1].held == ("1" * 64,)


def test_an_older_revision_changes_nothing() -> None:
    it = Driven()
    it.wants(("d1", manifest("1")))
    it.passes(60)
    it.hears(DeviceTopic.DESIRED, DesiredState(SPOKEN, "default", 1))
    it.passes(60)
    assert it.serves == ["1"]
    assert it.reports[-1].revision == 1


@pytest.mark.parametrize(
    ("effect", "phase", "code"),
    [
        ("latency_ratio: 4", Phase.ROLLED_BACK, WireErrorCode.PROBATION_FAILED),
        ("error_rate: 0.6", Phase.ROLLED_BACK, WireErrorCode.PROBATION_FAILED),
        ("crash: 1", Phase.ROLLED_BACK, WireErrorCode.WORKER_CRASHED),
        ("install_fails: 1", Phase.FAILED, WireErrorCode.LOAD_FAILED),
    ],
)
def test_a_version_that_does_badly_is_taken_back(effect: str, phase: Phase, code: WireErrorCode) -> None:
    it = Driven(effects=f'{{version: "m@2*", {effect}}}')
    it.wants(("d1", manifest("1")))
    it.passes(60)
    it.wants(("d2", manifest("2.0")))
    it.passes(60)
    d1, d2 = it.reports[-1].deployments
    assert (d1.phase, d2.phase) == (Phase.ACTIVE, phase)
    assert d2.failure is not None
    assert d2.failure.code is code
    assert it.serves == ["1"]
    models = {one.version for batch in it.batches[-2:] for one in batch.models}
    assert models == {"1"}


def test_an_effect_is_for_whom_it_says() -> None:
    it = Driven(effects='{version: "m@1", where: {profile: jetson-orin}, crash: 1}')
    it.wants(("d1", manifest("1")))
    it.passes(60)
    assert it.serves == ["1"]


def test_going_back_needs_no_download() -> None:
    it = Driven(", link: {bytes_s: 10000}")
    it.wants(("d1", manifest("1")))
    it.passes(120)
    it.wants(("d2", manifest("2")))
    it.passes(120)
    assert it.serves == ["2"]
    it.wants(("back", manifest("1")))
    it.passes(10)
    assert it.serves == ["1"]
    assert it.phases("back")[-1] is Phase.ACTIVE
    assert it.reports[-1].deployments[-1].sources == {}


def test_what_is_not_wanted_any_more_is_taken_off() -> None:
    it = Driven()
    it.wants(("d1", manifest("1")))
    it.passes(60)
    it.wants()
    assert it.serves == []
    assert it.phases("d1")[-1] is Phase.SUPERSEDED


def test_telemetry_is_sent_again_until_it_is_acknowledged() -> None:
    it = Driven(stored=False)
    it.passes(60)
    names = [(one.spool_id, one.sequence) for one in it.batches]
    assert names.count(("run-1", 1)) > 1
    assert len(names) < it.device.windows == it.device.spooled  # less and less often
    it.hears(DeviceTopic.TELEMETRY_ACK, TelemetryAck("run-1", tuple(range(1, it.device.windows + 1))))
    assert (it.device.spooled, it.device.acknowledged) == (0, it.device.windows)
    it.outputs.clear()
    it.passes(30)
    assert not set(names) & {(one.spool_id, one.sequence) for one in it.batches}


def test_windows_add_up_to_what_it_is_asked() -> None:
    it = Driven(", labels: {share: 0.5, accuracy: 0.8, classes: 4}, error_rate: 0.1")
    it.wants(("d1", manifest("1")))
    it.passes(1000)
    windows = {(one.spool_id, one.sequence): one for one in it.batches}.values()
    models = [model for window in windows for model in window.models]
    requests = sum(one.requests for one in models)
    assert it.device.requests == requests == sum(sum(one.latency.values()) for one in models)
    assert requests == pytest.approx(20 * 990, rel=0.05)
    assert sum(one.errors for one in models) == pytest.approx(0.1 * requests, rel=0.1)
    cells = [cell for one in models for cell in one.confusion]
    labelled = sum(count for _, _, count in cells)
    assert labelled == pytest.approx(0.45 * requests, rel=0.1)
    assert sum(n for label, said, n in cells if label == said) == pytest.approx(0.8 * labelled, rel=0.05)
    for before, after in zip(windows, list(windows)[1:], strict=False):
        assert before.ended_at == after.started_at


def test_a_device_without_a_link_serves_on_and_tells_of_it_later() -> None:
    it = Driven()
    it.wants(("d1", manifest("1")))
    it.passes(60)
    before = len(it.outputs)
    it.take(it.device.link_lost)
    while it.now < NOON + 300:
        it.now = it.device.next_at
        it.take(it.device.tick)
    assert all(isinstance(one, Connect) for one in it.outputs[before:])
    assert it.device.spooled > 20
    it.connect()
    it.passes(60)
    sequences = {one.sequence for one in it.batches}
    assert sequences == set(range(1, it.device.windows + 1))


def test_one_that_starts_anew_is_another_boot_with_the_same_memory() -> None:
    it = Driven(", reboots_per_day: 400, reboot_s: 20", stored=False)
    it.wants(("d1", manifest("1")))
    it.passes(1000)
    boots = [one.boot_id for one in it.outputs if isinstance(one, Connect)]
    assert len(boots) > 1
    assert boots == [f"run-{number + 1}" for number in range(len(boots))]
    assert all(one.anew for one in it.outputs if isinstance(one, Connect) and one.boot_id != "run-1")
    assert any(isinstance(one, Cut) for one in it.outputs)
    assert (it.reports[-1].boot_id, it.reports[-1].revision) == (boots[-1], 1)
    assert it.serves == ["1"]
    assert {one.spool_id for one in it.batches} <= set(boots)
    started = max(number for number, one in enumerate(it.outputs) if isinstance(one, Connect))
    del it.outputs[:started]
    assert ("run-1", 1) in {(one.spool_id, one.sequence) for one in it.batches}


def test_a_lying_clock_is_told_and_not_lived_by() -> None:
    it, liar = Driven(), Driven(", clock_offset_s: -86400")
    for one in (it, liar):
        one.passes(60)
    assert [one.ended_at - 86_400 for one in it.batches] == pytest.approx([one.ended_at for one in liar.batches])


def test_being_offline_comes_and_goes() -> None:
    it = Driven(", offline: {every_s: 100, for_s: 30}")
    it.passes(1000)
    cuts = [one for one in it.outputs if isinstance(one, Cut)]
    assert len(cuts) in {9, 10, 11}


def test_chunks_come_by_the_broker_where_the_file_says_so() -> None:
    it = Driven(", link: {fetch: mqtt}")
    it.wants(("d1", manifest("1", golden=DataFile("a" * 64, 100, 100))))
    it.passes(1)
    assert Listen("a" * 64, on=True) in it.outputs
    assert decode(it.said(DeviceTopic.NEED)[0], Need).digest == "a" * 64

    def chunk(topic: str, size: int) -> None:
        it.take(lambda now: it.device.message(topic, b"x" * size, now))

    own = it.device.device_id
    chunk(repair_topic(own, "a" * 64, 0), 100)
    it.passes(1)
    need = decode(it.said(DeviceTopic.NEED)[-1], Need)
    assert (need.digest, [(one.first, one.last) for one in need.missing]) == ("1" * 64, [(0, 3)])
    chunk(broadcast_topic("1" * 64, 0), 262_144)
    chunk(broadcast_topic("1" * 64, 0), 262_144)  # twice, counted and no more
    chunk(broadcast_topic("1" * 64, 1), 7)  # not a chunk's length
    chunk(broadcast_topic("1" * 64, 1), 262_144)
    chunk(broadcast_topic("1" * 64, 2, 3), 262_144)  # helps nobody who lacks both
    chunk(broadcast_topic("1" * 64, 3), 1_000_000 - 3 * 262_144)
    assert it.phases("d1")[-1] is Phase.DOWNLOADING
    chunk(broadcast_topic("1" * 64, 0, 2), 262_144)
    it.passes(30)
    assert it.serves == ["1"]
    assert it.reports[-1].deployments[0].sources == {"mqtt": 100 + 5 * 262_144 + 7 + 1_000_000 - 3 * 262_144}


def test_it_measures_nothing_for_a_gate_and_says_so() -> None:
    it = Driven()
    it.wants(trials=(Trial("t", (msgspec.Raw(manifest_bytes(manifest("1"))),), DataFile("b" * 64, 1, 1)),))
    (trial,) = it.reports[-1].trials
    assert trial.phase is TrialPhase.FAILED
    assert trial.failure is not None


def asked(driven: Driven, kind: str, *, seconds: float = 5.0) -> CommandAnswer:
    """What came last of a command."""
    name = f"c-{kind}"
    command = Command(name, kind, 60.0, driven.now + 60)
    driven.hears(DeviceTopic.COMMAND, command)
    driven.passes(seconds)
    return decode(driven.said(DeviceTopic.COMMAND_ANSWER)[-1], CommandAnswer)


def running(more: str = "") -> Driven:
    driven = Driven(more)
    driven.wants(("d", manifest("1")))
    driven.passes(20)
    return driven


def test_a_command_is_done_once_however_often_it_comes() -> None:
    driven = running()
    first = asked(driven, "identify")
    assert first.phase is CommandPhase.SUCCEEDED
    answers = len(driven.said(DeviceTopic.COMMAND_ANSWER))
    assert asked(driven, "identify") == first
    assert len(driven.said(DeviceTopic.COMMAND_ANSWER)) == answers + 1


def test_a_restart_takes_the_model_away_and_brings_it_back() -> None:
    driven = running()
    driven.hears(DeviceTopic.COMMAND, Command("r", "restart-runtime", 60.0, driven.now + 60))
    assert driven.serves == []
    driven.passes(5)
    assert driven.serves == ["1"]
    assert driven.phases("d")[-1] is Phase.ACTIVE  # the version is not to blame


def test_a_restart_is_not_begun_while_a_version_is_watched() -> None:
    driven = Driven()
    driven.wants(("d", manifest("1")))
    while Phase.PROBATION not in driven.phases("d"):
        driven.passes(0.2)
    answer = asked(driven, "restart-runtime", seconds=0.5)
    assert (answer.phase, answer.code) == (CommandPhase.REFUSED, "busy")


def test_a_log_is_followed_until_it_is_cancelled() -> None:
    driven = running()
    follow = Command("log", "logs", 600.0, driven.now + 60, CommandArguments(lines=1, follow=True))
    driven.hears(DeviceTopic.COMMAND, follow)
    driven.passes(5)
    driven.wants(("e", manifest("2")))
    driven.passes(20)
    driven.hears(DeviceTopic.COMMAND, msgspec.structs.replace(follow, cancel=True))
    answers = [decode(one, CommandAnswer) for one in driven.said(DeviceTopic.COMMAND_ANSWER)]
    lines = [line.text for one in answers for line in one.lines]
    assert "m@2: active" in lines
    assert len(lines) == len(set(lines))
    assert answers[-1].phase is CommandPhase.CANCELLED


@pytest.mark.parametrize(
    ("conduct", "kind", "phase", "code"),
    [
        ("fails: 1", "facts", CommandPhase.FAILED, "measuring_failed"),
        ("fails: 1", "logs", CommandPhase.FAILED, "internal"),
        ("forbidden: [identify]", "identify", CommandPhase.REFUSED, "not_allowed"),
        ("delay_s: 30", "facts", CommandPhase.RUNNING, ""),
        ("delay_s: 1000", "facts", CommandPhase.RUNNING, ""),
    ],
)
def test_commands_are_slow_and_fail_where_the_file_says_so(
    conduct: str, kind: str, phase: CommandPhase, code: str
) -> None:
    driven = running(f", commands: {{{conduct}}}")
    answer = asked(driven, kind)
    assert (answer.phase, answer.code) == (phase, code)
    if phase is CommandPhase.RUNNING:
        driven.passes(100)
        last = decode(driven.said(DeviceTopic.COMMAND_ANSWER)[-1], CommandAnswer)
        assert last.phase is (CommandPhase.TIMED_OUT if "1000" in conduct else CommandPhase.SUCCEEDED)
    assert driven.reports[-1].facts.commands[kind] is (code != "not_allowed")


def test_what_went_on_when_it_fell_was_interrupted() -> None:
    driven = running(", reboots_per_day: 24, reboot_s: 1, commands: {delay_s: 1000000}")
    command = Command("c", "identify", 86_000.0, driven.now + 86_000)
    driven.hears(DeviceTopic.COMMAND, command)
    first = driven.reports[-1].boot_id
    while driven.reports[-1].boot_id == first:
        driven.passes(60)
    driven.hears(DeviceTopic.COMMAND, command)
    answer = decode(driven.said(DeviceTopic.COMMAND_ANSWER)[-1], CommandAnswer)
    assert (answer.phase, answer.code) == (CommandPhase.FAILED, "interrupted")


def samples_asked(driven: Driven, *, sampling: bool = True, rows: int = 10) -> UploadReport:
    """What came of a request for samples, the server having taken every piece."""
    driven.revision += 1
    rules = (Sampling("m", below=0.95),) if sampling else ()
    wanted = (DesiredDeployment("d", msgspec.Raw(manifest_bytes(manifest("1"))), probation=WATCH),)
    state = DesiredState(SPOKEN, "default", driven.revision, wanted, 10.0, sampling=rules)
    driven.hears(DeviceTopic.DESIRED, state)
    driven.passes(60)
    driven.revision += 1
    request = (SampleRequest("u", "m", rows, 1 << 20),)
    driven.hears(DeviceTopic.DESIRED, msgspec.structs.replace(state, revision=driven.revision, sample_requests=request))
    driven.passes(2)
    for one in driven.said(DeviceTopic.SAMPLES):
        piece = decode(one, SamplePiece)
        ended = piece.offset + len(piece.data)
        driven.hears(DeviceTopic.SAMPLES_ACK, SampleAck("u", piece.digest, ended, stored=ended == piece.size))
    driven.passes(2)
    samples = driven.reports[-1].samples
    assert samples is not None
    (upload,) = samples.uploads
    return upload


def test_samples_are_kept_sent_and_forgotten() -> None:
    driven = running()
    upload = samples_asked(driven)
    assert (upload.phase, upload.samples) == (UploadPhase.DONE, 10)
    (piece,) = [decode(one, SamplePiece) for one in driven.said(DeviceTopic.SAMPLES)]
    with zipfile.ZipFile(io.BytesIO(piece.data)) as archive:
        listing = msgspec.json.decode(archive.read("samples.json"), type=list[SampleLine])
    assert len(listing) == 10
    assert all(one.confidence < 0.95 for one in listing)
    kept = [one.samples.kept for one in driven.reports if one.samples is not None]
    assert kept[-1] == max(kept) - 10


@pytest.mark.parametrize(
    ("more", "sampling", "reason"),
    [
        ("", False, "off"),
        (", samples: {allow: false}", True, "not_allowed"),
        (", samples: {fails: 1}", True, "store_error"),
    ],
)
def test_samples_do_not_come_where_they_are_off_or_fail(more: str, sampling: bool, reason: str) -> None:
    upload = samples_asked(running(more), sampling=sampling)
    assert (upload.phase, upload.reason) == (UploadPhase.FAILED, reason)


def test_rubbish_is_refused_and_counted() -> None:
    it = Driven()
    topic = device_topic(it.device.device_id, DeviceTopic.DESIRED)
    assert it.device.message(topic, b"{}", it.now) == []
    assert it.device.message("elsewhere", b"", it.now) == []
    assert it.device.refused == 2


def test_a_seed_is_the_same_story_again() -> None:
    def story(seed: int) -> list[bytes]:
        it = Driven(", latency: {drift: 0.2}, cuts_per_hour: 60", effects='{version: "m@1", crash: 0.5}', seed=seed)
        it.wants(("d1", manifest("1")))
        it.passes(600)
        return it.said(DeviceTopic.REPORTED) + it.said(DeviceTopic.TELEMETRY)

    assert story(1) == story(1)
    assert story(1) != story(2)
