"""The agent's main process: takes events from one queue, asks the updater what follows, and carries it out.

It owns the threads' lives and the shutdown. It loads no runtime: what runs models is the worker.
"""

from __future__ import annotations

import logging
import os
import queue
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.commands.ring import LogRing, RingHandler
from agent.commands.starters import open_desk
from agent.condition import Condition
from agent.config import Config
from agent.deployments import Deployments
from agent.head_start import MEMORY_SETTINGS
from agent.inference import Inference
from agent.inferences import Inferences
from agent.mqtt import LinkUp, MqttChunk, MqttLink, MqttMessage
from agent.peers.balancing import Balancing
from agent.peers.network import Lan
from agent.pipelines.children import Pipelines, PipelineSaid
from agent.protocol.codec import decode, encode
from agent.protocol.commands import Command, CommandAnswer
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.facts import DeviceFacts
from agent.protocol.limits import LIMITS
from agent.protocol.messages import (
    Certificate,
    DesiredDeployment,
    DesiredState,
    Presence,
    Reported,
    SourceNeed,
    SourceOffer,
    TelemetryAck,
    Trial,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.parts import InferPart, PartAnswer
from agent.protocol.samples import SampleAck, SamplePiece, Sampling
from agent.protocol.topics import DeviceTopic, is_chunk_topic, parse_chunk_topic, parse_device_topic
from agent.protocol.version import SPOKEN
from agent.releases.leaving import Leaving
from agent.releases.releases import KEY as RELEASE
from agent.releases.releases import Releases, Start, Unpacked
from agent.renewal import Renewal, tls_context
from agent.reporter import Reporter
from agent.resuming import Files, Resumed
from agent.samples.collecting import Collecting
from agent.sd_notify import ServiceManager
from agent.serving.ipc import AskFigures, ChooseSamples, FromWorker, Logged, Ready, Sampled, TellFigures
from agent.telemetry.figures import PhaseFigure, SupervisorFigures
from agent.telemetry.host import own_memory_mb
from agent.telemetry.sender import TelemetrySender
from agent.telemetry.spool import Spool
from agent.trial.trials import Trials
from agent.update.budget import Ledger
from agent.update.bundle_file import BundlesSeen, Held
from agent.update.bundles import Bundles, BundleTrustSaid
from agent.update.fetcher import Fetcher, Kept
from agent.update.other_sources import OtherSources
from agent.update.pace import Pacer
from agent.update.source_tls import Credentials
from agent.update.transfer import SourceChunk, TransferEnded
from agent.update.trust_ipc import Target
from agent.update.verify import TrustSaid, Verifier
from agent.update.zones import zone_of
from agent.worker_process import WorkerDied, WorkerProcess

log = logging.getLogger("agent")
TICK_S = 0.1  # between looks at what goes on
LIVELY_S = 1.0  # what goes on may be followed by something else
QUIET_TICK_S = 5.0  # where nothing does: what comes from elsewhere is an event, and waits for no look
TRIAL = "trial:"  # begins the key of a trial's trust check; a deployment's is its id


@dataclass(frozen=True)
class PeerFound:
    """A peer on the LAN, by the name that mDNS has; it has gone where there is no place."""

    name: str
    place: str | None
    infers: bool = False


class _Turn:
    """Whether somebody may use the trusted metadata now: one at a time."""

    def __init__(self, may: Callable[[], bool]) -> None:
        self._may = may

    @property
    def connected(self) -> bool:
        return self._may()


class Supervisor:
    """The daemon.

    Args:
        config: of the agent.
        resumed: what was begun before; None where nothing was.
    """

    def __init__(self, config: Config, resumed: Resumed | None = None) -> None:
        self._config = config
        # Its `put` may be called by a signal handler.
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue() if resumed is None else resumed.events
        self._resumed = resumed
        self._boot_id = uuid.uuid4().hex
        files = Files.open(config) if resumed is None else resumed.files
        self._ring = LogRing()
        self._ring_handler = RingHandler(self._log)
        logging.getLogger().addHandler(self._ring_handler)
        self._store, self._journal, self._updater, good = files.store, files.journal, files.updater, files.good
        self._store.drop_other = self._drop_sample
        self._spool = Spool(config.state_dir / "spool.db")
        self._condition = Condition(self._journal, self._spool, good.lost, str(config.state_dir))
        context = tls_context(config)
        self._link = MqttLink(config, self._boot_id, self._events.put, context)
        self._renewal = Renewal(config, self._link, context) if context else None
        credentials = Credentials(config)
        self._others = OtherSources(config, self._link, self._events.put, self._say_source_need, credentials)
        zone = zone_of(config.time_zone)
        self._pacer = Pacer(
            Ledger(self._journal, zone), config.own_limits, lambda name: zone_of(name) if name else zone
        )
        self._reporter = Reporter(
            config,
            self._link,
            set_link=self._pacer.set_link,
            about_agent=lambda: self._releases.facts,
            settled=lambda: self._inference.settled,
            compose=self._reported,
        )
        self._samples = Collecting(
            config.state_dir,
            config.samples,
            floor_bytes=int(config.disk_floor_mb * 2**20),
            pacer=self._pacer,
            send=self._say_samples,
            tell_worker=self._choose_samples,
            changed=self._reporter.changed,
        )
        self._fetcher = Fetcher(self._store, self._link, str(config.state_dir), others=self._others, pacer=self._pacer)
        self._link.keep_by(self._keep)
        self._trials = Trials(
            config.state_dir / "trials",
            self._store,
            self._journal,
            self._fetcher,
            MEMORY_SETTINGS,
            changed=self._trials_changed,
            check_trust=self._check_trial,
        )
        self._verifier = Verifier(
            config,
            _Turn(lambda: self._link.connected and self._bundles.idle),
            self._events.put,
            say_need=self._say_trust_need,
            answered=self._trust_answered,
        )
        self._bundles = Bundles(
            config,
            self._journal,
            self._events.put,
            turn=_Turn(lambda: self._verifier.idle),
            profiles=lambda: {one.manifest.profile for one in self._updater.records.values()},
            order=self._ordered,
        )
        self._deployments = Deployments(
            self._updater,
            self._journal,
            good,
            self._store,
            self._fetcher,
            self._pacer,
            self._link,
            self._condition,
            self._verifier,
            others_need=lambda: self._trials.kept_digests() | self._releases.kept_digests(),
            others_use=lambda: self._releases.useful_digests(),  # noqa: PLW0108 (they are made later)
            journal_renewed=self._keep_all,
            changed=self._reporter.changed,
        )
        self._worker = WorkerProcess(config, self._events.put) if resumed is None else resumed.worker
        self._lan = Lan(
            config,
            credentials,
            self._held,
            self._found_peer,
            found_inference=self._found_inference,
            inference_place=self._worker.peer_place,
        )
        self._balancing = Balancing(config, credentials, lambda: self._worker.peer_place, self._worker.send)
        self._inference = Inference(
            self._worker,
            self._store,
            self._updater,
            good,
            self._condition,
            carry_out=self._deployments.carry_out,
            changed=self._reporter.changed,
            switched=self._deployments.switched,
            window=lambda message, started: self._telemetry.window(message, started),  # noqa: PLW0108 (made below)
            hang_s=config.hang_s,
            ensembles=config.ensembles,
        )
        self._telemetry = TelemetrySender(
            config.state_dir, self._journal, self._spool, self._link, self._condition, self._inference.collect
        )
        self._commands, self._command_book = open_desk(
            config,
            self._journal,
            self._inference,
            self._store,
            self._ring,
            say=self._say_command,
            measure=self._reporter.measure,
            take_facts=self._reporter.take,
        )
        self._inferences = Inferences(config.inference, self._worker.place, self._say_part)
        self._pipelines = Pipelines(config, self._events.put, self._condition)
        self._start = Start.read(os.environ)
        self._leaving = Leaving(
            config,
            self._start,
            self._link,
            self._inference,
            busy={
                "a model's version is being tried": lambda: self._deployments.trying,
                "candidates are being measured": lambda: self._trials.busy,
                "a command is being carried out": lambda: self._commands.busy,
            },
            old_worker=None if resumed is None else resumed.old_worker,
            stop=self.stop,
            go_on=self._go_on,
        )
        self._releases = Releases(
            config,
            self._start,
            self._journal,
            self._store,
            self._fetcher,
            self._pacer,
            self._link,
            self._events.put,
            check_trust=self._verifier.check,
            cancel_trust=self._verifier.cancel,
            changed=self._reporter.changed,
            device=self._leaving,
        )
        self._postponed: DesiredState | None = None  # while this agent is on trial
        self._parts = (
            self._releases,
            self._inference,
            self._deployments,
            self._trials,
            self._commands,
            self._samples,
            self._pipelines,
            self._verifier,
            self._bundles,
        )
        self._quiet_at = 0.0
        self._stopping = False

    def stop(self) -> None:
        """Ask the main loop to end; may be called from a signal handler."""
        self._stopping = True
        self._events.put(None)  # the main loop may wait for one

    def run(self, manager: ServiceManager) -> None:
        """Work until asked to stop; whoever watches this process learns that this loop goes round."""
        self.begin()
        manager.ready()
        try:
            while not self._stopping:
                manager.alive()
                self.turn(min(self._wait_s, manager.rest_s))
        finally:
            if not self._leaving.leaves:  # else this process goes on, as another version of the agent
                manager.stopping()
            self.end()

    def begin(self) -> None:
        """Take up what an earlier run left, and connect."""
        log.info("device %s, boot %s", self._config.device_id, self._boot_id[:8])
        if self._resumed is None or self._resumed.loads is None:
            self._inference.start()
        else:
            self._inference.take_over(self._resumed.loads)
        self._reporter.tick_link(time.monotonic())
        self._deployments.begin(self._inference)
        self._releases.begin()
        self._bundles.start()
        self._link.start()

    def turn(self, wait_s: float) -> None:
        """Handle one event, if one comes in that time, and look after everything once."""
        try:
            event = self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait()
        except queue.Empty:
            event = None
        self._condition.guard(lambda: self._handle(event))
        for step in self._steps:
            self._condition.guard(step)

    def end(self) -> None:
        """Let go of everything."""
        self._link.stop()
        logging.getLogger().removeHandler(self._ring_handler)
        self._commands.stop()
        self._inferences.stop()
        self._pipelines.stop()
        self._trials.stop()
        self._deployments.stop()
        self._releases.stop()
        self._fetcher.stop()
        self._pacer.close()
        self._others.stop()
        self._verifier.stop()
        self._bundles.stop()
        self._lan.stop()
        self._leaving.end()
        self._journal.close()
        self._spool.close()

    def become_next(self) -> None:
        """After the end: become the launcher, where this agent left for another version of it; else nothing."""
        self._leaving.become_next()

    def _handle(self, event: Any) -> None:
        match event:
            case Kept():
                self._fetcher.kept(event, time.monotonic())
            case MqttChunk():
                self._chunk(event)
            case MqttMessage():
                self._message(event)
            case LinkUp():
                self._link.publish(
                    DeviceTopic.PRESENCE, encode(Presence(online=True, boot_id=self._boot_id)), retain=True
                )
                self._reporter.changed()
                self._telemetry.link_up()
                self._condition.link_up()
                self._fetcher.link_up(time.monotonic())
                self._samples.link_up()
                if self._renewal is not None:
                    self._renewal.link_up(event.epoch)
                self._verifier.link_up()
                self._reporter.report(force=True)
            case SourceChunk() | TransferEnded() | BundlesSeen() | BundleTrustSaid() | PeerFound():
                self._other_source(event, time.monotonic())
            case TrustSaid() | PipelineSaid() | Unpacked():
                self._child_said(event, time.monotonic())
            case WorkerDied() if event.generation == self._worker.generation:
                self._balancing.worker_ended()
                self._inference.died()
            case (generation, message) if generation == self._worker.generation:
                self._worker_said(message)
            case _:
                pass

    def _child_said(self, event: TrustSaid | PipelineSaid | Unpacked, now: float) -> None:
        if isinstance(event, TrustSaid):
            self._verifier.said(event, now)
        elif isinstance(event, Unpacked):
            self._releases.unpacked(event)
        else:
            self._pipelines.said(event, now)

    def _worker_said(self, message: FromWorker) -> None:
        if isinstance(message, Sampled):
            self._samples.sampled(message.samples)
            return
        if isinstance(message, Logged):
            self._ring.add(message.at, message.level, "worker", message.logger, message.text)
            return
        if isinstance(message, AskFigures):
            self._worker.send(TellFigures(self._figures()))
            return
        self._inference.said(message)
        if isinstance(message, Ready):
            self._samples.worker_ready()
            self._balancing.worker_ready()

    def _figures(self) -> SupervisorFigures:
        records = self._updater.records.values()
        return SupervisorFigures(
            device_id=self._config.device_id,
            connected=self._link.connected,
            spooled=self._spool.count,
            spooled_bytes=self._spool.size,
            spool_dropped=self._spool.dropped,
            workers_ended=self._inference.workers_ended,
            problems=len(self._condition.reports()),
            rss_mb=own_memory_mb(),
            deployments=tuple(
                PhaseFigure(one.deployment_id, one.manifest.model, one.manifest.version, one.phase.value)
                for one in records
            ),
        )

    # -- what the server says

    def _keep(self, chunk: MqttChunk) -> Kept | None:
        """Called from the link's thread."""
        try:
            return self._fetcher.keep(parse_chunk_topic(chunk.topic), chunk.payload)
        except WireError:
            return None  # `_chunk` says so

    def _chunk(self, chunk: MqttChunk | MqttMessage) -> None:
        try:
            self._fetcher.chunk(parse_chunk_topic(chunk.topic), chunk.payload, time.monotonic())
        except WireError as error:
            log.warning("refused a message on %s: %s", chunk.topic, error)
        finally:
            if isinstance(chunk, MqttChunk):
                chunk.release()

    def _message(self, message: MqttMessage) -> None:
        if is_chunk_topic(message.topic):
            self._chunk(message)
            return
        try:
            leaf = parse_device_topic(message.topic).leaf
            if leaf is DeviceTopic.DESIRED and message.payload:
                self._desired(decode(message.payload, DesiredState))
            elif leaf is DeviceTopic.TELEMETRY_ACK:
                self._telemetry.acknowledged(decode(message.payload, TelemetryAck))
            elif leaf is DeviceTopic.CERTIFICATE and self._renewal is not None:
                self._renewal.answered(decode(message.payload, Certificate))
            elif leaf is DeviceTopic.TRUST:
                self._verifier.piece(decode(message.payload, TrustPiece))
            elif leaf is DeviceTopic.SOURCE:
                self._others.offered(decode(message.payload, SourceOffer), time.monotonic())
            elif leaf is DeviceTopic.SAMPLES_ACK:
                self._samples.acknowledged(decode(message.payload, SampleAck), time.monotonic())
            else:
                self._asked(leaf, message.payload)
        except WireError as error:
            log.warning("refused a message on %s: %s", message.topic, error)

    def _asked(self, leaf: DeviceTopic, payload: bytes) -> None:
        if leaf is DeviceTopic.COMMAND:
            self._commands.received(decode(payload, Command), time.monotonic(), time.time())
        elif leaf is DeviceTopic.INFER:
            self._inferences.received(decode(payload, InferPart))

    def _desired(self, state: DesiredState) -> None:
        """Accept a desired state; an agent that has yet to prove itself changes nothing, and does so when it has."""
        if self._releases.on_trial:
            self._postponed = state
            return
        if state.revision >= self._updater.revision:
            self._balancing.listed(state.peers)
        if self._deployments.desired(state):
            self._trials.desired(state.trials)
            self._condition.guard(lambda: self._samples.desired(state))
            self._releases.desired(state.agent)
        self._deployments.write_revision()
        self._telemetry.wanted(state.telemetry_interval_s)
        self._reporter.report(force=True)

    def _go_on(self) -> None:
        """This agent has proved itself."""
        state, self._postponed = self._postponed, None
        if state is not None:
            self._desired(state)
        self._reporter.report(force=True)

    # -- whether what the server says was signed

    def _check_trial(self, trial: Trial) -> None:
        pairs = zip(trial.read_candidates(), trial.candidates, strict=True)
        targets = tuple(Target(manifest.trial_path, bytes(signed)) for manifest, signed in pairs)
        self._verifier.check(TRIAL + trial.trial_id, targets)

    def _say_trust_need(self, need: TrustNeed) -> None:
        self._link.publish(DeviceTopic.TRUST_NEED, encode(need))

    def _trust_answered(self, key: str, code: WireErrorCode | None, detail: str) -> None:
        if code is not None:
            log.error("refused (%s): %s", code.value, detail)
        if key.startswith(TRIAL):
            self._trials.trust_answered(key.removeprefix(TRIAL), code, detail)
        elif key.startswith(RELEASE):
            self._releases.trust_answered(key, code, detail)
        else:
            self._deployments.trust_answered(key, code, detail)

    # -- other sources, and bundles

    def _other_source(self, event: Any, now: float) -> None:
        match event:
            case SourceChunk():
                self._fetcher.source_chunk(event, now)
            case TransferEnded():
                self._others.ended(event, now)
            case BundlesSeen():
                self._bundles.seen(event.bundles)
                self._others.see_bundles(event.bundles)
            case BundleTrustSaid():
                self._bundles.said(event, now)
            case PeerFound(infers=True):
                self._balancing.found(event.name, event.place)
            case PeerFound():
                self._others.see_peer(event.name, event.place)

    def _say_source_need(self, need: SourceNeed) -> None:
        self._link.publish(DeviceTopic.SOURCE_NEED, encode(need))

    def _ordered(self, deployments: list[DesiredDeployment]) -> None:
        self._deployments.ordered(deployments)
        self._reporter.report(force=True)

    def _held(self, digest: str) -> Held | None:
        """A whole artifact of this device, in its store or in a bundle; asked from other threads."""
        path = self._store.path(digest)
        return Held(path, 0, path.stat().st_size) if path.is_file() else self._bundles.held(digest)

    def _found_peer(self, name: str, place: str | None) -> None:
        self._events.put(PeerFound(name, place))

    def _found_inference(self, name: str, place: str | None) -> None:
        self._events.put(PeerFound(name, place, infers=True))

    def _drop_sample(self) -> bool:
        return self._samples.drop_lowest()

    def _say_samples(self, piece: SamplePiece) -> None:
        self._link.publish(DeviceTopic.SAMPLES, encode(piece))

    def _choose_samples(self, sampling: tuple[Sampling, ...]) -> None:
        self._worker.send(ChooseSamples(sampling))

    def _say_part(self, answer: PartAnswer) -> None:
        """Called from threads."""
        self._link.publish(DeviceTopic.INFERRED, encode(answer))

    # -- commands

    def _say_command(self, answer: CommandAnswer) -> bool:
        return self._link.publish(DeviceTopic.COMMAND_ANSWER, encode(answer)) is not None

    def _log(self, at: float, level: str, logger: str, text: str) -> None:
        """Called from whatever thread logs."""
        self._ring.add(at, level, "agent", logger, text)

    def _keep_all(self) -> None:
        """The journal was lost."""
        self._trials.keep_all()
        self._command_book.keep_all()
        self._releases.keep_all()

    # -- what happens here

    def _trials_changed(self) -> None:
        self._deployments.collect_garbage()
        self._reporter.changed()

    # -- time

    @property
    def _wait_s(self) -> float:
        """How long nothing need be looked after if no event comes, in seconds: each look costs an idle device."""
        now = time.monotonic()
        if any(one.busy for one in self._parts):
            self._quiet_at = now + LIVELY_S
        if now < self._quiet_at:
            return TICK_S
        return max(0.0, min(QUIET_TICK_S, self._telemetry.due_in(now), self._inference.looks_every_s))

    @property
    def _steps(self) -> tuple[Callable[[], None], ...]:
        """What is looked after again and again."""
        return (
            self._inference.tick,
            self._deployments.tick_journal,
            self._deployments.tick,
            lambda: self._releases.tick(time.monotonic()),
            lambda: self._leaving.tick(on_trial=self._releases.on_trial),
            self._reporter.tick_facts,
            self._tick_condition,
            lambda: self._telemetry.tick(time.monotonic()),
            lambda: self._trials.tick(time.monotonic()),
            lambda: self._pipelines.tick(time.monotonic()),
            lambda: self._commands.tick(time.monotonic()),
            lambda: self._samples.tick(time.monotonic(), connected=self._link.connected),
            self._tick_link,
            lambda: self._reporter.report(force=False),
        )

    def _tick_condition(self) -> None:
        self._condition.mend(time.monotonic())
        if self._condition.changed:
            self._reporter.changed()
            self._condition.keep()

    def _tick_link(self) -> None:
        now, wall = time.monotonic(), time.time()
        self._reporter.tick_link(now)
        self._condition.watch(connected=self._link.connected)
        if self._renewal is not None:
            self._renewal.tick(now, wall)
        self._verifier.tick(now)
        self._bundles.tick(now)
        self._lan.tick(now)
        self._balancing.tick(now)

    def _reported(self, sequence: int, facts: DeviceFacts) -> Reported:
        """All that is true now."""
        return Reported(
            protocol=SPOKEN,
            boot_id=self._boot_id,
            sequence=sequence,
            revision=self._updater.revision,
            facts=facts,
            deployments=self._deployments.reports(),
            serving=self._inference.serving,
            sent_at=time.time(),
            trials=self._trials.reports(),
            held=tuple(self._store.held()[: LIMITS.held]),
            problems=self._condition.reports(),
            samples=self._samples.report,
            releases=self._releases.reports(),
        )
