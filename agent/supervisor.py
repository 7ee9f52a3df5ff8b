"""The agent's main process: takes events from one queue, asks the updater what follows, and carries it out.

It owns the threads' lives and the shutdown. It loads no runtime: what runs models is the worker.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.condition import Condition
from agent.config import Config
from agent.database import DatabaseError
from agent.files import STORAGE_ERRORS, remove_leftovers, storage_code
from agent.hardware import measure
from agent.link import detect_link
from agent.mqtt import LinkUp, MqttLink, MqttMessage
from agent.peers.network import Lan
from agent.protocol.codec import decode, encode
from agent.protocol.delivery import Waiting
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.lifecycle import ENDED, SETTLED, Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Certificate,
    DeploymentReport,
    DesiredDeployment,
    DesiredState,
    ModelWindow,
    Presence,
    Reported,
    ServingReport,
    SourceNeed,
    SourceOffer,
    TelemetryAck,
    TelemetryBatch,
    Trial,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.topics import DeviceTopic, parse_chunk_topic, parse_device_topic
from agent.protocol.version import SPOKEN
from agent.renewal import Renewal, tls_context
from agent.serving.ipc import (
    Activate,
    Activated,
    Collect,
    FromWorker,
    Load,
    Loaded,
    Peek,
    Peeked,
    Ready,
    Unload,
    Window,
)
from agent.source_config import SourceKind
from agent.telemetry.host import measure_host
from agent.telemetry.spool import Spool
from agent.trial.trials import Trials
from agent.update.budget import Ledger
from agent.update.bundle_file import BundlesSeen, Held
from agent.update.bundles import Bundles, BundleTrustSaid
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.lastgood import Good, LastGood
from agent.update.other_sources import OtherSources
from agent.update.pace import Pacer
from agent.update.probation import Probation, fall_back
from agent.update.retriever import Retriever
from agent.update.source_tls import Credentials
from agent.update.standin import StandIns
from agent.update.store import ArtifactStore
from agent.update.transfer import SourceChunk, TransferEnded
from agent.update.trust_ipc import Target
from agent.update.updater import (
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    Effect,
    LoadArtifact,
    Record,
    StopDownload,
    UnloadArtifact,
    Updater,
    Verify,
)
from agent.update.verify import TrustSaid, Verifier
from agent.update.zones import zone_of
from agent.worker_process import MEMORY_SETTINGS, WorkerDied, WorkerProcess

log = logging.getLogger("agent")
TICK_S = 0.1
REPORT_EVERY_S = 300.0
TELEMETRY_RESEND_S = 15.0
TELEMETRY_BATCHES = 20
WORKER_RESTART_MAX_S = 30.0
GOLDEN = ".golden"  # ends the key under which a deployment's golden inputs are fetched; its artifact's is its id
MEMORY_LEFT_MB = 16.0  # that a load must leave to others
RETRY_S = 2.0
LINK_EVERY_S = 5.0
TRIAL = "trial:"  # begins the key of a trial's trust check; a deployment's is its id


@dataclass(frozen=True)
class PeerFound:
    """A peer on the LAN, by the name that mDNS has; it has gone where there is no place."""

    name: str
    place: str | None


class _Turn:
    """Whether somebody may use the trusted metadata now: one at a time."""

    def __init__(self, may: Callable[[], bool]) -> None:
        self._may = may

    @property
    def connected(self) -> bool:
        return self._may()


class Supervisor:
    """The daemon."""

    def __init__(self, config: Config) -> None:
        config.state_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._events: queue.Queue[Any] = queue.Queue()
        self._boot_id = uuid.uuid4().hex
        self._sequence = 0
        remove_leftovers(config.state_dir)
        self._store = ArtifactStore(
            config.state_dir / "artifacts",
            floor_bytes=int(config.disk_floor_mb * 2**20),
            keep_bytes=int(config.store_keep_mb * 2**20),
        )
        self._journal = Journal(config.state_dir / "journal.db")
        self._spool = Spool(config.state_dir / "spool.db")
        self._updater = Updater(self._journal.load(), int(self._journal.number("revision", 0)))
        self._good = LastGood(config.state_dir / "serving.json")
        self._condition = Condition(self._journal, self._spool, self._good.lost)
        self._facts = measure(config.state_dir, tags=config.tags, runtimes=config.runtimes)
        context = tls_context(config)
        self._link = MqttLink(config, self._boot_id, self._events.put, context)
        self._renewal = Renewal(config, self._link, context) if context else None
        self._worker = WorkerProcess(config, self._events.put)
        self._credentials = Credentials(config)
        self._others = OtherSources(config, self._link, self._events.put, self._say_source_need, self._credentials)
        zone = zone_of(config.time_zone)
        self._pacer = Pacer(
            Ledger(self._journal, zone), config.own_limits, lambda name: zone_of(name) if name else zone
        )
        self._fetcher = Fetcher(self._store, self._link, str(config.state_dir), others=self._others, pacer=self._pacer)
        self._retriever = Retriever(self._store, self._fetcher, self._link, self._save_record)
        self._stand_ins = StandIns(self._good, self._store, self._updater, self._load_stand_in, self._unload)
        self._held_back: set[str] = set()  # deployments that have come, and wait for their time
        self._link_at = 0.0
        self._probation = Probation()
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
        self._lan = Lan(config, self._credentials, self._held, self._found_peer)
        self._waiting: list[Effect] = []  # for the journal: nothing is done before it is written
        self._written_revision = self._updater.revision
        self._retry_at = 0.0
        self._loads: dict[int, str] = {}
        self._worker_is_ready = False
        self._telemetry_interval_s = self._journal.number("telemetry_interval_s", 10.0)
        self._collects: dict[int, float] = {}
        self._request_id = 0
        self._serving: dict[str, ServingReport] = {}
        self._activations: dict[int, ServingReport] = {}
        self._loaded: dict[str, Loaded] = {}
        self._logged = {key: record.phase for key, record in self._updater.records.items()}
        self._report_at = 0.0
        self._worker_at: float | None = None
        self._worker_delay = 0.5
        self._collect_at = time.monotonic() + self._telemetry_interval_s
        self._window_started = time.time()
        self._stopping = False

    def stop(self) -> None:
        """Ask the main loop to end; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Work until asked to stop."""
        self.begin()
        try:
            while not self._stopping:
                self.turn(TICK_S)
        finally:
            self.end()

    def begin(self) -> None:
        """Take up what an earlier run left, and connect."""
        log.info("device %s, boot %s", self._config.device_id, self._boot_id[:8])
        self._start_worker()
        self._look_at_link(time.monotonic())
        self._carry_out(self._updater.recover())
        self._collect_garbage()  # an earlier run may have ended between forgetting a file's user and the file
        self._bundles.start()
        self._link.start()

    def turn(self, wait_s: float) -> None:
        """Handle one event, if one comes in that time, and look after everything once."""
        try:
            event = self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait()
        except queue.Empty:
            event = None
        self._guarded(lambda: self._handle(event))
        for step in self._steps:
            self._guarded(step)

    def end(self) -> None:
        """Let go of everything."""
        self._link.stop()
        self._trials.stop()
        self._retriever.stop()
        self._fetcher.stop()
        self._pacer.close()
        self._others.stop()
        self._verifier.stop()
        self._bundles.stop()
        self._lan.stop()
        self._worker.stop()
        self._journal.close()
        self._spool.close()

    def _guarded(self, step: Callable[[], None]) -> None:
        """Whatever fails, fails alone: what serves goes on."""
        try:
            step()
        except DatabaseError as error:
            self._condition.storage(error.code, error.detail)
        except Exception as error:
            log.exception("an event could not be handled; the agent goes on")
            if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                self._condition.storage(storage_code(error), f"{self._config.state_dir}: {error.strerror}")

    def _handle(self, event: Any) -> None:
        match event:
            case MqttMessage():
                self._message(event)
            case LinkUp():
                self._link.publish(
                    DeviceTopic.PRESENCE, encode(Presence(online=True, boot_id=self._boot_id)), retain=True
                )
                self._report_at = 0.0
                self._condition.link_up()
                self._fetcher.link_up(time.monotonic())
                if self._renewal is not None:
                    self._renewal.link_up(event.epoch)
                self._verifier.link_up()
                self._report(force=True)
            case SourceChunk() | TransferEnded() | BundlesSeen() | BundleTrustSaid() | PeerFound():
                self._other_source(event, time.monotonic())
            case TrustSaid():
                self._verifier.said(event, time.monotonic())
            case WorkerDied() if event.generation == self._worker.generation:
                self._worker_died()
            case (generation, message) if generation == self._worker.generation:
                self._worker_said(message)
            case _:
                pass

    # -- what the server says

    def _message(self, message: MqttMessage) -> None:
        try:
            if "/b/" in message.topic:
                self._fetcher.chunk(parse_chunk_topic(message.topic), message.payload, time.monotonic())
                return
            leaf = parse_device_topic(message.topic).leaf
            if leaf is DeviceTopic.DESIRED and message.payload:
                self._desired(decode(message.payload, DesiredState))
            elif leaf is DeviceTopic.TELEMETRY_ACK:
                self._spool.acknowledge(decode(message.payload, TelemetryAck))
            elif leaf is DeviceTopic.CERTIFICATE and self._renewal is not None:
                self._renewal.answered(decode(message.payload, Certificate))
            elif leaf is DeviceTopic.TRUST:
                self._verifier.piece(decode(message.payload, TrustPiece))
            elif leaf is DeviceTopic.SOURCE:
                self._others.offered(decode(message.payload, SourceOffer), time.monotonic())
        except WireError as error:
            log.warning("refused a message on %s: %s", message.topic, error)

    def _desired(self, state: DesiredState) -> None:
        self._collect_at = min(self._collect_at, time.monotonic() + state.telemetry_interval_s)
        fresh = state.revision > self._updater.revision
        effects = self._updater.desired(state)
        if fresh:
            ordered = {one.manifest.model for one in self._updater.records.values() if one.ordered}
            models = {one.read_manifest().model for one in state.deployments}
            self._guarded(lambda: self._good.retain(models | ordered))
        self._carry_out(effects)
        if fresh:
            self._trials.desired(state.trials)
        self._write_revision()
        if self._telemetry_interval_s != state.telemetry_interval_s:
            self._telemetry_interval_s = state.telemetry_interval_s
            self._journal.keep_number("telemetry_interval_s", state.telemetry_interval_s)
        self._report(force=True)

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
        elif key in self._updater.records:
            found = self._updater
            self._carry_out(found.trusted(key) if code is None else found.failed(key, code, detail))

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
            case PeerFound():
                self._others.see_peer(event.name, event.place)

    def _say_source_need(self, need: SourceNeed) -> None:
        self._link.publish(DeviceTopic.SOURCE_NEED, encode(need))

    def _ordered(self, deployments: list[DesiredDeployment]) -> None:
        self._carry_out(self._updater.ordered(deployments))
        self._report(force=True)

    def _held(self, digest: str) -> Held | None:
        """A whole artifact of this device, in its store or in a bundle; asked from other threads."""
        path = self._store.path(digest)
        return Held(path, 0, path.stat().st_size) if path.is_file() else self._bundles.held(digest)

    def _found_peer(self, name: str, place: str | None) -> None:
        self._events.put(PeerFound(name, place))

    # -- what is fetched for deployments

    def received(self, key: str, count: int, source: str) -> None:
        """Bytes came for a deployment; those of a stick came over no network."""
        record = self._updater.records[key.removesuffix(GOLDEN)]
        record.count(source, count)
        record.received_bytes += 0 if source.startswith(SourceKind.USB.value) else count

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """What is fetched for a deployment must wait, or goes on."""
        deployment_id = key.removesuffix(GOLDEN)
        if deployment_id in self._updater.records:
            self._updater.waits(deployment_id, waiting)
            self._save()

    def fetched(self, key: str) -> None:
        """A deployment's golden inputs came, which are small and come first, or its artifact, and with it all."""
        record = self._updater.records[key.removesuffix(GOLDEN)]
        if key.endswith(GOLDEN):
            self._retriever.begin(record, self, time.monotonic())
        else:
            self._carry_out(self._updater.downloaded(key))

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """Something of a deployment will not come."""
        self._carry_out(self._updater.failed(key.removesuffix(GOLDEN), code, detail))

    # -- what the worker says

    def _worker_said(self, message: FromWorker) -> None:
        match message:
            case Ready():
                log.info("the local inference API is at %s", message.url)
                self._worker_delay = 0.5
                self._worker_is_ready = True
                self._carry_out(self._updater.worker_ready())
            case Loaded():
                self._load_answered(message)
            case Window():
                self._window(message)
            case Peeked():
                self._probation.counted(message, time.monotonic())
            case Activated():
                self._activated(message)

    def _load_answered(self, message: Loaded) -> None:
        if self._stand_ins.asked(message.request_id):
            self._stand_in_answered(message)
            return
        deployment_id = self._loads.pop(message.request_id, None)
        if deployment_id is None or deployment_id not in self._updater.records:
            return
        if message.code is None:
            self._loaded[deployment_id] = message
            self._carry_out(self._updater.loaded(deployment_id))
        else:
            self._carry_out(self._updater.failed(deployment_id, message.code, message.detail))

    def _activated(self, message: Activated) -> None:
        """What is reported as serving is what the worker says it has swapped in."""
        serving = self._activations.pop(message.request_id, None)
        if serving is not None and message.ok:
            self._serving[serving.model] = serving
            self._report_at = 0.0
        elif serving is not None:
            log.error("the worker has no %s@%s to answer with; it is loaded again", serving.model, serving.version)
            record = self._updater.records.get(serving.deployment_id)
            if record is not None and record.phase not in ENDED:
                self._load(record)

    def _worker_died(self) -> None:
        status = self._worker.reap()
        log.error("the inference worker ended with %s; starting it again in %.1f s", status, self._worker_delay)
        self._condition.worker_ended(status)
        self._worker_is_ready = False
        self._stand_ins.worker_ended()
        self._loads.clear()
        self._activations.clear()
        self._collects.clear()
        self._serving.clear()
        self._carry_out(self._updater.worker_crashed(self._probation.clear()))
        self._worker_at = time.monotonic() + self._worker_delay
        self._worker_delay = min(self._worker_delay * 2, WORKER_RESTART_MAX_S)

    def _window(self, message: Window) -> None:
        ended = time.time()
        started = self._collects.pop(message.request_id, ended)
        host = measure_host(self._config.state_dir, message.rss_mb)
        # With those that were taken out meanwhile there may be more than a batch holds: it would never be accepted.
        models = tuple(m for m in message.models if _did_something(m))[: LIMITS.models_per_batch]
        self._guarded(
            lambda: self._spool.add(
                lambda spool_id, sequence: TelemetryBatch(SPOKEN, spool_id, sequence, started, ended, models, host)
            )
        )
        self._condition.count_dropped()
        self._send_telemetry()

    # -- carrying out

    def _carry_out(self, effects: list[Effect]) -> None:
        """Do what follows, once it is written down. What serves is loaded and answers all the same."""
        urgent = [effect for effect in effects if self._waiting and self._needs_no_journal(effect)]
        for effect in urgent:
            self._carry_out_one(effect)
        self._waiting += [effect for effect in effects if effect not in urgent]
        while self._save() and self._waiting:
            effect = self._waiting.pop(0)
            try:
                self._carry_out_one(effect)
            except Exception as error:
                log.exception("%s could not be done", effect)
                self._give_up(effect, f"{type(error).__name__}: {str(error)[:500]}")

    def _needs_no_journal(self, effect: Effect) -> bool:
        if not isinstance(effect, LoadArtifact | ActivateArtifact) or effect.deployment_id in self._updater.changed:
            return False
        record = self._updater.records.get(effect.deployment_id)
        return record is not None and record.phase is Phase.ACTIVE

    def _give_up(self, effect: Effect, detail: str) -> None:
        """A deployment that can't go on says so, and does not hang."""
        record = None if isinstance(effect, UnloadArtifact) else self._updater.records.get(effect.deployment_id)
        if record is not None and record.phase not in SETTLED:
            self._carry_out(self._updater.failed(record.deployment_id, WireErrorCode.INTERNAL, detail))

    def _save(self) -> bool:
        """The journal is written before anything is done; false when it can't be now."""
        if not self._updater.changed:
            return True
        changed = {key: self._updater.records[key] for key in self._updater.changed}
        try:
            self._journal.save(changed)
        except DatabaseError as error:
            self._journal_failed(error)
            return False
        self._updater.changed.clear()
        for record in changed.values():
            self._log_phase(record)
        self._guarded(lambda: self._good.update(self._updater.records.values()))
        self._guarded(self._forget)
        self._collect_garbage()
        self._report_at = 0.0
        return True

    def _log_phase(self, record: Record) -> None:
        """Once a phase: a record also changes in what only the journal cares for."""
        if self._logged.get(record.deployment_id) is not record.phase:
            self._logged[record.deployment_id] = record.phase
            why = f": {record.failure.detail}" if record.failure is not None else ""
            log.info("%s@%s is %s%s", record.manifest.model, record.manifest.version, record.phase.value, why)

    def _save_record(self, record: Record) -> None:
        """What became of one of a deployment's encodings."""
        self._updater.changed.add(record.deployment_id)
        self._save()

    def _forget(self) -> None:
        forgotten = self._updater.forgettable()
        self._journal.forget(forgotten)
        for key in forgotten:
            del self._updater.records[key]
            self._logged.pop(key, None)

    def _trials_changed(self) -> None:
        self._collect_garbage()
        self._report_at = 0.0

    def _collect_garbage(self) -> None:
        kept = self._updater.kept_digests() | self._trials.kept_digests() | self._good.needed()
        self._store.collect_garbage(kept, self._good.useful())

    def _carry_out_one(self, effect: Effect) -> None:
        record = None if isinstance(effect, UnloadArtifact) else self._updater.records.get(effect.deployment_id)
        match effect:
            case UnloadArtifact():
                self._unload(effect.model, effect.digest)
            case CheckTrust() if record is not None:
                target = Target(record.manifest.target_path, record.signed)
                self._verifier.check(record.deployment_id, (target,))
            case Download() if record is not None:
                self._fetch(record)
            case StopDownload():
                self._verifier.cancel(effect.deployment_id)
                self._retriever.cancel(effect.deployment_id)
                self._fetcher.cancel(effect.deployment_id + GOLDEN)
                self._probation.end(effect.deployment_id)
            case Verify() if record is not None:
                self._verify(record)
            case LoadArtifact() if record is not None:
                self._load(record)
            case ActivateArtifact() if record is not None:
                self._activate(record)
            case BeginProbation() if record is not None:
                self._begin_probation(record, effect.before_id)
            case _:
                pass

    def _fetch(self, record: Record) -> None:
        """Golden inputs first: they are small, and a device that can't have them need not fetch the rest."""
        golden, now = record.manifest.golden, time.monotonic()
        if golden is None or self._store.verify(golden.digest):  # one that lies there damaged comes anew
            self._retriever.begin(record, self, now)
        else:
            key = record.deployment_id + GOLDEN
            self._fetcher.begin(
                key,
                golden,
                self,
                deadline_s=record.deadline_s,
                now=now,
                server_only=record.server_only,
                delivery=record.delivery,
            )

    def _verify(self, record: Record) -> None:
        """Check what came; what is good but may not serve yet is held until it may."""
        verified = [self._store.verify(content.digest) for content in record.manifest.contents]
        good = all(verified)
        waiting = self._pacer.activation(record.delivery) if good else None
        if waiting is not None:
            self._held_back.add(record.deployment_id)
            self._updater.waits(record.deployment_id, waiting)
            return
        self._carry_out(self._updater.verified(record.deployment_id, good=good))

    def _let_in(self) -> None:
        """Go on with deployments that waited until now."""
        for key in list(self._held_back):
            record = self._updater.records.get(key)
            if record is None or record.phase is not Phase.VERIFYING:
                self._held_back.discard(key)
            elif self._pacer.activation(record.delivery) is None:
                self._held_back.discard(key)
                self._verify(record)

    def _look_at_link(self, now: float) -> None:
        """Find out by what kind of link the server is reached; a change is reported."""
        self._link_at = now + LINK_EVERY_S
        found = detect_link(self._config.link_type, self._config.link_metered)
        if found != self._facts.link:
            self._facts = msgspec.structs.replace(self._facts, link=found)
            self._pacer.set_link(found)
            self._report_at = 0.0

    def _load(self, record: Record) -> None:
        """Let the worker load an artifact; one that is to be tried needs room for two, and its golden answers."""
        digest, golden = record.manifest.digest, record.manifest.golden
        tried = record.phase is Phase.LOADING
        if record.deployment_id in self._loads.values():
            return
        if not self._store.verify(digest):
            detail = "the artifact on this device's disk is damaged and was removed: roll it out again"
            self._carry_out(self._updater.failed(record.deployment_id, WireErrorCode.DIGEST_MISMATCH, detail))
            return
        self._request_id += 1
        self._loads[self._request_id] = record.deployment_id
        self._worker.send(
            Load(
                self._request_id,
                record.deployment_id,
                record.manifest,
                str(self._store.path(digest)),
                golden_path=str(self._store.path(golden.digest)) if tried and golden is not None else "",
                need_mb=_needed_mb(record) if tried else 0.0,
            )
        )

    def _activate(self, record: Record) -> None:
        manifest, loaded = record.manifest, self._loaded.get(record.deployment_id)
        if loaded is None:
            return
        self._let_serve(manifest, record.deployment_id, loaded)

    def _let_serve(self, manifest: Manifest, deployment_id: str, loaded: Loaded) -> None:
        self._request_id += 1
        self._activations[self._request_id] = ServingReport(
            manifest.model,
            manifest.version,
            manifest.digest,
            deployment_id,
            loaded.runtime,
            loaded.provider,
            loaded.load_s,
        )
        self._worker.send(Activate(self._request_id, manifest.model, manifest.digest))

    def _begin_probation(self, record: Record, before_id: str | None) -> None:
        loaded = self._loaded[record.deployment_id]
        self._probation.begin(
            record.deployment_id,
            record.watching,
            time.monotonic(),
            before_id=before_id,
            before_mb=loaded.before_mb,
            provider=loaded.provider,
            note=fall_back(record.manifest.providers, loaded.provider),
        )

    def _unload(self, model: str, digest: str) -> None:
        self._worker.send(Unload(model, digest))
        self._stand_ins.unloaded(model, digest)
        serving = self._serving.get(model)
        swapping = any(one.model == model for one in self._activations.values())
        if serving is not None and serving.digest == digest and not swapping:
            del self._serving[model]

    # -- what serves while what ought to can't

    def _stand_in(self) -> None:
        if self._worker_is_ready:
            records = [self._updater.records.get(one) for one in self._loads.values()]
            loading = {record.manifest.model for record in records if record is not None}
            loading |= {serving.model for serving in self._activations.values()}
            self._stand_ins.tick({one.model: one.digest for one in self._serving.values()}, loading)

    def _load_stand_in(self, good: Good) -> int:
        self._request_id += 1
        path = str(self._store.path(good.manifest.digest))
        self._worker.send(Load(self._request_id, good.deployment_id, good.manifest, path))
        return self._request_id

    def _stand_in_answered(self, message: Loaded) -> None:
        good = self._stand_ins.answered(message.request_id, ok=message.code is None)
        if good is None or good.manifest.model in self._serving or good.manifest.model not in self._good.models:
            return
        self._let_serve(good.manifest, good.deployment_id, message)
        active = self._updater.active(good.manifest.model)
        if active is None or active.deployment_id != good.deployment_id:
            self._condition.stands_in(good.manifest.model, good.manifest.version)

    # -- the journal

    def _journal_failed(self, error: DatabaseError) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if self._condition.journal_failed(error):
            self._updater.changed.update(self._updater.records)
            self._written_revision = -1
            self._trials.keep_all()

    def _tick_journal(self) -> None:
        """Write what could not be written before."""
        now = time.monotonic()
        if now >= self._retry_at and (self._updater.changed or self._waiting):
            self._carry_out([])
        self._write_revision()
        self._condition.mend(now)
        if self._condition.changed:
            self._report_at = 0.0
            self._condition.keep()

    def _write_revision(self) -> None:
        """Only after everything that came with it: a device that forgets must be told again."""
        if not (self._waiting or self._updater.changed) and self._written_revision != self._updater.revision:
            self._journal.keep_number("revision", self._updater.revision)
            self._written_revision = self._updater.revision

    # -- time

    @property
    def _steps(self) -> tuple[Callable[[], None], ...]:
        """What is looked after again and again."""
        return (
            self._tick_worker,
            self._tick_journal,
            self._tick_updates,
            self._stand_in,
            self._tick_telemetry,
            lambda: self._trials.tick(time.monotonic()),
            self._tick_link,
            lambda: self._report(force=False),
        )

    def _start_worker(self) -> None:
        self._loads.clear()  # what was asked while there was none is asked again when it is ready
        try:
            self._worker.start()
            self._condition.worker_started(None)
        except OSError as error:
            self._condition.worker_started(error)
            self._worker_at = time.monotonic() + self._worker_delay
            self._worker_delay = min(self._worker_delay * 2, WORKER_RESTART_MAX_S)

    def _tick_worker(self) -> None:
        if self._worker_at is not None and time.monotonic() >= self._worker_at:
            self._worker_at = None
            self._start_worker()

    def _tick_updates(self) -> None:
        now = time.monotonic()
        if now >= self._link_at:
            self._look_at_link(now)
        self._fetcher.tick(now)
        if self._probation.asks(now):
            self._request_id += 1
            self._worker.send(Peek(self._request_id))
        self._retriever.tick(now)
        self._let_in()
        for over in self._probation.tick(now):
            self._carry_out(self._updater.probation_over(over.deployment_id, problem=over.problem, report=over.report))
            if over.silent:
                self._worker.kill()

    def _tick_telemetry(self) -> None:
        now = time.monotonic()
        if now >= self._collect_at:
            self._collect_at = now + self._telemetry_interval_s
            self._request_id += 1
            self._collects[self._request_id] = self._window_started
            self._window_started = time.time()
            self._worker.send(Collect(self._request_id))

    def _tick_link(self) -> None:
        now, wall = time.monotonic(), time.time()
        self._condition.watch(connected=self._link.connected)
        if self._renewal is not None:
            self._renewal.tick(now, wall)
        self._verifier.tick(now)
        self._bundles.tick(now)
        self._lan.tick(now)

    def _send_telemetry(self) -> None:
        if self._link.connected:
            due = self._spool.due(time.monotonic(), resend_s=TELEMETRY_RESEND_S, limit=TELEMETRY_BATCHES)
            for _, payload in due:
                self._link.publish(DeviceTopic.TELEMETRY, payload)

    def _report(self, *, force: bool) -> None:
        """Say what is true, when it changed."""
        now = time.monotonic()
        changed = self._report_at == 0.0
        if not (force or changed or now - self._report_at > REPORT_EVERY_S) or not self._link.connected:
            return
        self._report_at = now
        self._sequence += 1
        reported = Reported(
            protocol=SPOKEN,
            boot_id=self._boot_id,
            sequence=self._sequence,
            revision=self._updater.revision,
            facts=self._facts,
            deployments=tuple(self._deployment_report(record) for record in self._updater.records.values()),
            serving=tuple(self._serving.values()),
            sent_at=time.time(),
            trials=self._trials.reports(),
            held=tuple(self._store.held()[: LIMITS.held]),
            problems=self._condition.reports(),
        )
        self._link.publish(DeviceTopic.REPORTED, encode(reported))

    def _deployment_report(self, record: Record) -> DeploymentReport:
        download = self._retriever.progress(record.deployment_id)
        failure = record.failure if record.phase in ENDED and record.phase is not Phase.SUPERSEDED else None
        return DeploymentReport(
            deployment_id=record.deployment_id,
            model=record.manifest.model,
            version=record.manifest.version,
            digest=record.manifest.digest,
            phase=record.phase,
            received_bytes=record.received_bytes,
            missing_chunks=download.part.missing if download else 0,
            failure=failure,
            attempts=record.attempts,
            probation=self._probation.report(record.deployment_id) or record.probation,
            encoding=record.encoding,
            sources=record.sources,
            waiting=record.waiting,
        )


def _did_something(model: ModelWindow) -> bool:
    return bool(model.requests or model.rejected or model.confusion)


def _needed_mb(record: Record) -> float:
    """Memory that loading a version beside what serves takes, in MiB: as it was measured, but no less than its file."""
    size = record.manifest.size / 2**20
    measured = record.watching.load_mb
    return MEMORY_LEFT_MB + max(size, 2 * size if measured is None else measured)
