"""The agent's main process: takes events from one queue, asks the updater what follows, and carries it out.

It owns the threads' lives and the shutdown. It loads no runtime: what runs models is the worker.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable
from typing import Any

from agent.config import Config
from agent.hardware import measure
from agent.mqtt import LinkUp, MqttLink, MqttMessage
from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.lifecycle import ENDED, Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content
from agent.protocol.messages import (
    Certificate,
    DeploymentReport,
    DesiredState,
    ModelWindow,
    Presence,
    Reported,
    ServingReport,
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
from agent.telemetry.host import measure_host
from agent.telemetry.spool import Spool
from agent.trial.trials import Trials
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.probation import Probation, fall_back
from agent.update.store import ArtifactStore
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
from agent.worker_process import MEMORY_SETTINGS, WorkerDied, WorkerProcess

log = logging.getLogger("agent")
TICK_S = 0.1
REPORT_EVERY_S = 300.0
TELEMETRY_RESEND_S = 15.0
TELEMETRY_BATCHES = 20
WORKER_RESTART_MAX_S = 30.0
GOLDEN = ".golden"  # ends the key under which a deployment's golden inputs are fetched; its artifact's is its id
MEMORY_LEFT_MB = 16.0  # that a load must leave to others
TRIAL = "trial:"  # begins the key of a trial's trust check; a deployment's is its id


class Supervisor:
    """The daemon."""

    def __init__(self, config: Config) -> None:
        config.state_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._events: queue.Queue[Any] = queue.Queue()
        self._boot_id = uuid.uuid4().hex
        self._sequence = 0
        self._store = ArtifactStore(config.state_dir / "artifacts")
        self._journal = Journal(config.state_dir / "journal.db")
        self._spool = Spool(config.state_dir / "spool.db")
        self._updater = Updater(self._journal.load(), int(self._journal.number("revision", 0)))
        self._facts = measure(config.state_dir, tags=config.tags, runtimes=config.runtimes)
        context = tls_context(config)
        self._link = MqttLink(config, self._boot_id, self._events.put, context)
        self._renewal = Renewal(config, self._link, context) if context else None
        self._worker = WorkerProcess(config, self._events.put)
        self._fetcher = Fetcher(self._store, self._link, str(config.state_dir))
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
            config, self._link, self._events.put, say_need=self._say_trust_need, answered=self._trust_answered
        )
        self._loads: dict[int, str] = {}
        self._collects: dict[int, float] = {}
        self._request_id = 0
        self._serving: dict[str, ServingReport] = {}
        self._activations: dict[int, ServingReport] = {}
        self._loaded: dict[str, Loaded] = {}
        self._logged = {key: record.phase for key, record in self._updater.records.items()}
        self._report_at = 0.0
        self._worker_at: float | None = None
        self._worker_delay = 0.5
        self._collect_at = time.monotonic() + self._interval()
        self._window_started = time.time()
        self._stopping = False

    def stop(self) -> None:
        """Ask the main loop to end; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Work until asked to stop."""
        log.info("device %s, boot %s", self._config.device_id, self._boot_id[:8])
        self._worker.start()
        self._carry_out(self._updater.recover())
        self._collect_garbage()  # an earlier run may have ended between forgetting a file's user and the file
        self._link.start()
        try:
            while not self._stopping:
                try:
                    event = self._events.get(timeout=TICK_S)
                except queue.Empty:
                    event = None
                self._guarded(lambda event=event: self._handle(event))  # type: ignore[misc]
                self._guarded(self._tick)
        finally:
            self._link.stop()
            self._trials.stop()
            self._fetcher.stop()
            self._verifier.stop()
            self._worker.stop()
            self._journal.close()
            self._spool.close()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            log.exception("an event could not be handled; the agent goes on")

    def _handle(self, event: Any) -> None:
        match event:
            case MqttMessage():
                self._message(event)
            case LinkUp():
                self._link.publish(
                    DeviceTopic.PRESENCE, encode(Presence(online=True, boot_id=self._boot_id)), retain=True
                )
                self._report_at = 0.0
                self._fetcher.link_up(time.monotonic())
                if self._renewal is not None:
                    self._renewal.link_up(event.epoch)
                self._verifier.link_up()
                self._report(force=True)
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
        except WireError as error:
            log.warning("refused a message on %s: %s", message.topic, error)

    def _desired(self, state: DesiredState) -> None:
        self._journal.keep_number("telemetry_interval_s", state.telemetry_interval_s)
        self._collect_at = min(self._collect_at, time.monotonic() + state.telemetry_interval_s)
        fresh = state.revision > self._updater.revision
        effects = self._updater.desired(state)
        self._carry_out(effects)
        if fresh:
            self._trials.desired(state.trials)
        self._journal.keep_number("revision", self._updater.revision)
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

    # -- what is fetched for deployments

    def received(self, key: str, count: int) -> None:
        """Bytes came over the wire for a deployment."""
        self._updater.records[key.removesuffix(GOLDEN)].received_bytes += count

    def fetched(self, key: str) -> None:
        """A deployment's golden inputs came, which are small and come first, or its artifact, and with it all."""
        record = self._updater.records[key.removesuffix(GOLDEN)]
        if key.endswith(GOLDEN):
            self._fetch_one(record.deployment_id, record.manifest, record)
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
            log.error("the worker has no %s@%s to answer with", serving.model, serving.version)

    def _worker_died(self) -> None:
        status = self._worker.reap()
        log.error("the inference worker ended with %s; starting it again in %.1f s", status, self._worker_delay)
        self._loads.clear()
        self._collects.clear()
        self._serving.clear()
        self._activations.clear()
        self._carry_out(self._updater.worker_crashed(self._probation.clear()))
        self._worker_at = time.monotonic() + self._worker_delay
        self._worker_delay = min(self._worker_delay * 2, WORKER_RESTART_MAX_S)

    def _window(self, message: Window) -> None:
        ended = time.time()
        started = self._collects.pop(message.request_id, ended)
        host = measure_host(self._config.state_dir, message.rss_mb)
        # With those that were taken out meanwhile there may be more than a batch holds: it would never be accepted.
        models = tuple(m for m in message.models if _did_something(m))[: LIMITS.models_per_batch]
        self._spool.add(
            lambda spool_id, sequence: TelemetryBatch(SPOKEN, spool_id, sequence, started, ended, models, host)
        )
        self._send_telemetry()

    # -- carrying out

    def _carry_out(self, effects: list[Effect]) -> None:
        self._save()
        for effect in effects:
            self._carry_out_one(effect)
        self._save()

    def _save(self) -> None:
        """The journal is written before anything is done."""
        if self._updater.changed:
            self._journal.save({key: self._updater.records[key] for key in self._updater.changed})
            for key in self._updater.changed:
                self._log_phase(self._updater.records[key])
            self._updater.changed.clear()
            forgotten = self._updater.forgettable()
            self._journal.forget(forgotten)
            for key in forgotten:
                del self._updater.records[key]
                self._logged.pop(key, None)
            self._collect_garbage()
            self._report_at = 0.0

    def _log_phase(self, record: Record) -> None:
        """Once a phase: a record also changes in what only the journal cares for."""
        if self._logged.get(record.deployment_id) is not record.phase:
            self._logged[record.deployment_id] = record.phase
            why = f": {record.failure.detail}" if record.failure is not None else ""
            log.info("%s@%s is %s%s", record.manifest.model, record.manifest.version, record.phase.value, why)

    def _trials_changed(self) -> None:
        self._collect_garbage()
        self._report_at = 0.0

    def _collect_garbage(self) -> None:
        self._store.collect_garbage(self._updater.kept_digests() | self._trials.kept_digests())

    def _carry_out_one(self, effect: Effect) -> None:
        record = None if isinstance(effect, UnloadArtifact) else self._updater.records.get(effect.deployment_id)
        match effect:
            case UnloadArtifact():
                self._worker.send(Unload(effect.model, effect.digest))
                serving = self._serving.get(effect.model)
                swapping = any(one.model == effect.model for one in self._activations.values())
                if serving is not None and serving.digest == effect.digest and not swapping:
                    del self._serving[effect.model]
            case CheckTrust() if record is not None:
                target = Target(record.manifest.target_path, record.signed)
                self._verifier.check(record.deployment_id, (target,))
            case Download() if record is not None:
                self._fetch(record)
            case StopDownload():
                self._verifier.cancel(effect.deployment_id)
                self._fetcher.cancel(effect.deployment_id)
                self._fetcher.cancel(effect.deployment_id + GOLDEN)
                self._probation.end(effect.deployment_id)
            case Verify() if record is not None:
                golden = record.manifest.golden
                good = self._store.verify(record.manifest.digest)
                good = (golden is None or self._store.verify(golden.digest)) and good
                self._carry_out(self._updater.verified(record.deployment_id, good=good))
            case LoadArtifact() if record is not None:
                self._load(record)
            case ActivateArtifact() if record is not None:
                self._activate(record)
            case BeginProbation() if record is not None:
                self._begin_probation(record, effect.before_id)
            case _:
                pass

    def _fetch(self, record: Record) -> None:
        golden = record.manifest.golden
        if golden is None or self._store.verify(golden.digest):  # one that lies there damaged comes anew
            self._fetch_one(record.deployment_id, record.manifest, record)
        else:
            self._fetch_one(record.deployment_id + GOLDEN, golden, record)

    def _fetch_one(self, key: str, content: Content, record: Record) -> None:
        self._fetcher.begin(key, content, self, deadline_s=record.deadline_s, now=time.monotonic())

    def _load(self, record: Record) -> None:
        """Let the worker load an artifact; one that is to be tried needs room for two, and its golden answers."""
        digest, golden = record.manifest.digest, record.manifest.golden
        tried = record.phase is Phase.LOADING
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
        self._request_id += 1
        self._activations[self._request_id] = ServingReport(
            manifest.model,
            manifest.version,
            manifest.digest,
            record.deployment_id,
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

    # -- time

    def _tick(self) -> None:
        now = time.monotonic()
        if self._worker_at is not None and now >= self._worker_at:
            self._worker_at = None
            self._worker.start()
        self._fetcher.tick(now)
        if self._probation.asks(now):
            self._request_id += 1
            self._worker.send(Peek(self._request_id))
        for over in self._probation.tick(now):
            self._carry_out(self._updater.probation_over(over.deployment_id, problem=over.problem, report=over.report))
            if over.silent:
                self._worker.kill()
        if now >= self._collect_at:
            self._collect_at = now + self._interval()
            self._request_id += 1
            self._collects[self._request_id] = self._window_started
            self._window_started = time.time()
            self._worker.send(Collect(self._request_id))
        self._trials.tick(now)
        if self._renewal is not None:
            self._renewal.tick(now, time.time())
        self._verifier.tick(now)
        self._report(force=False)

    def _interval(self) -> float:
        return self._journal.number("telemetry_interval_s", 10.0)

    def _send_telemetry(self) -> None:
        if self._link.connected:
            due = self._spool.due(time.time(), resend_s=TELEMETRY_RESEND_S, limit=TELEMETRY_BATCHES)
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
        )
        self._link.publish(DeviceTopic.REPORTED, encode(reported))

    def _deployment_report(self, record: Record) -> DeploymentReport:
        download = self._fetcher.progress(record.deployment_id)
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
        )


def _did_something(model: ModelWindow) -> bool:
    return bool(model.requests or model.rejected or model.confusion)


def _needed_mb(record: Record) -> float:
    """Memory that loading a version beside what serves takes, in MiB: as it was measured, but no less than its file."""
    size = record.manifest.size / 2**20
    measured = record.watching.load_mb
    return MEMORY_LEFT_MB + max(size, 2 * size if measured is None else measured)
