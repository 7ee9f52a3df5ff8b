"""The worker as the device sees it: what it loads, what answers requests, and how new versions do when watched.

It carries out what the updater wants of the worker, and tells the updater what came of it. Called by the supervisor's
main loop only; it writes nothing down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from agent.condition import Condition
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import ENDED, Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Exposure,
    ExposureMode,
    OnProviderMissing,
    ProbationPolicy,
    ProbationReport,
    ServingReport,
)
from agent.replacement import Replacement
from agent.serving.ensemble_config import EnsembleConfig
from agent.serving.ensemble_health import EnsembleHealth
from agent.serving.ipc import (
    Activate,
    Activated,
    Collect,
    Declare,
    Expect,
    Expose,
    Exposed,
    FromWorker,
    GrpcServed,
    Load,
    Loaded,
    Peek,
    Peeked,
    Ready,
    Shutdown,
    Unload,
    Unservable,
    Window,
)
from agent.telemetry.crashes import Crashes
from agent.update.effects import ActivateArtifact, BeginProbation, Effect, ExposeArtifact, LoadArtifact
from agent.update.lastgood import Good, LastGood
from agent.update.probation import Probation, fall_back
from agent.update.standin import StandIns
from agent.update.store import ArtifactStore
from agent.update.updater import Record, Updater
from agent.watchdog import Watchdog
from agent.worker_process import WorkerProcess

log = logging.getLogger("agent")
RESTART_S, RESTART_MAX_S = 0.5, 30.0
STEADY_S = 10.0  # a worker that lived for so long is replaced at once
LOADING_S = 10.0  # a load that takes longer is reported, and again each time so much more of it is over
MEMORY_LEFT_MB = 16.0  # that a load must leave to others


class Inference:
    """The worker, and what serves.

    Args:
        worker: the process.
        store: where artifacts are.
        updater: what ought to serve; told what does.
        good: what served well.
        condition: notes how the worker is.
        carry_out: carries out what follows.
        changed: something is to be reported.
        switched: told the deployment whose artifact answers from now on.
        window: takes what models did, and when that began in Unix seconds.
        hang_s: how long one inference may take, in seconds; 0: for ever.
        ensembles: that the worker answers for.

    Attributes:
        workers_ended: how often a worker ended without being asked to.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        store: ArtifactStore,
        updater: Updater,
        good: LastGood,
        condition: Condition,
        *,
        carry_out: Callable[[list[Effect]], None],
        changed: Callable[[], None],
        switched: Callable[[str], None],
        window: Callable[[Window, float], None],
        hang_s: float,
        ensembles: tuple[EnsembleConfig, ...] = (),
    ) -> None:
        self._worker = worker
        self._store = store
        self._updater = updater
        self._good = good
        self._condition = condition
        self._carry_out = carry_out
        self._changed = changed
        self._switched = switched
        self._window = window
        self._ensembles = ensembles
        self._ensemble_health = EnsembleHealth(condition.ensemble)
        self._stand_ins = StandIns(good, store, updater, self._load_stand_in, self.unload)
        self._probation = Probation()
        self._watchdog = Watchdog(hang_s)
        self._hung = False  # the worker was ended for it
        self.workers_ended = 0
        self._crashes = Crashes()
        self._loads: dict[int, str] = {}
        self._load_since: dict[str, float] = {}
        self._said_loading = 0.0
        self._loaded: dict[str, Loaded] = {}
        self._activations: dict[int, ServingReport] = {}
        self._exposures: dict[int, tuple[str, Exposure]] = {}
        self._beside: dict[str, Exposure] = {}  # that the worker has confirmed
        self._serving: dict[str, ServingReport] = {}
        self._collects: dict[int, float] = {}
        self._request_id = 0
        self._is_ready = False
        self._start_at: float | None = None
        self._delay = 0.0
        self._ready_at: float | None = None
        self._expected: frozenset[str] | None = None  # as the worker was told
        self._window_started = time.time()
        self._manifests: dict[str, Manifest] = {}  # of what was let serve, by deployment
        self.replacement: Replacement | None = None

    @property
    def serving(self) -> tuple[ServingReport, ...]:
        """What answers requests, as the worker has confirmed."""
        return tuple(self._serving.values())

    def served(self) -> list[Manifest]:
        """Manifests of what answers requests."""
        return [self._manifests[one.deployment_id] for one in self._serving.values()]

    @property
    def _models(self) -> frozenset[str]:
        return frozenset(self._serving)

    @property
    def watched(self) -> bool:
        """Whether a version is watched."""
        return bool(self._probation.watched)

    @property
    def settled(self) -> bool:
        """Whether the worker is there and loads nothing: what does not serve now will not in a moment."""
        return self._is_ready and not (self._loads or self._activations or self._stand_ins.loading)

    @property
    def busy(self) -> bool:
        """Whether something goes on that must be looked after often."""
        replacing = self.replacement is not None and not self.replacement.over
        return not self.settled or replacing or bool(self._probation.watched) or self._ensemble_health.busy

    @property
    def looks_every_s(self) -> float:
        """How often the worker must be looked after when nothing goes on, in seconds."""
        return self._watchdog.every_s

    def replace(self) -> str:
        """Replace the worker by a new one that serves the same; `replacement` says how far that is.

        Returns:
            Why it is not done now, in a sentence; empty when it has begun.
        """
        if not self._is_ready or (self.replacement is not None and not self.replacement.over):
            return "the inference worker is just being started: send it again in a minute"
        if not self.settled or self._probation.watched:
            return "a version is being loaded or watched, and would be taken back: wait until that is over"
        log.warning("the inference worker is replaced because somebody asked for it")
        self.replacement = Replacement(self._models, time.monotonic())
        self._is_ready = False
        self._updater.worker_leaves()
        self.collect()
        self._worker.send(Shutdown())
        return ""

    def seen(self, deployment_id: str) -> ProbationReport | None:
        """What was seen so far of a version that is watched."""
        return self._probation.report(deployment_id)

    def loading_s(self, deployment_id: str) -> float:
        """How long a deployment's artifact is being loaded, in seconds, where that takes long; else 0."""
        if deployment_id not in self._loads.values():
            return 0.0
        took = time.monotonic() - self._load_since[deployment_id]
        return round(took, 1) if took >= LOADING_S else 0.0

    def exposure(self, deployment_id: str) -> Exposure | None:
        """How a version runs beside the one that serves, as the worker has confirmed."""
        return self._beside.get(deployment_id)

    def start(self) -> None:
        """Start a worker; where the system refuses, it is tried again."""
        self._loads.clear()  # what was asked while there was none is asked again when it is ready
        try:
            self._worker.start()
            self._condition.worker_started(None)
        except OSError as error:
            self._condition.worker_started(error)
            self._start_later()

    def take_over(self, loads: Mapping[int, str]) -> None:
        """A worker was started, and told what to load, before there was anything else.

        Args:
            loads: deployments that it was told to load, by the request's id.
        """
        self._loads = dict(loads)
        self._load_since = dict.fromkeys(loads.values(), time.monotonic())
        self._request_id = max(loads, default=0)
        self._condition.worker_started(None)

    def died(self) -> None:
        """The worker ended: another is started, and loads what ought to serve."""
        status = self._worker.reap()
        if self._ready_at is not None and time.monotonic() - self._ready_at >= STEADY_S:
            self._delay = 0.0
        self._ready_at = None
        if self.replacement is not None and self.replacement.ended(time.monotonic()):
            log.info("the inference worker has ended in order; starting the next one")
            self._delay = 0.0
        else:
            log.error("the inference worker ended with %s; starting it again in %.1f s", status, self._delay)
            self.workers_ended += 1
            if not self._hung:
                self._condition.worker_ended(status)
            self._count_crash()
        self._hung = False
        self._is_ready = False
        self._stand_ins.worker_ended()
        self._loads.clear()
        self._activations.clear()
        self._exposures.clear()
        self._beside.clear()
        self._collects.clear()
        self._serving.clear()
        self._carry_out(self._updater.worker_crashed(self._probation.clear()))
        self._start_later()

    def _start_later(self) -> None:
        """Start another worker after a pause, which grows until one lives for long: at first there is none."""
        self._start_at = time.monotonic() + self._delay
        self._delay = min(max(self._delay * 2, RESTART_S), RESTART_MAX_S)

    def _expect(self) -> None:
        """Tell the worker which models ought to be served, where that has changed; then it takes requests."""
        new = self.replacement
        if self._is_ready and new and not new.looked(self._models, time.monotonic(), loading=not self.settled):
            return
        records = self._updater.records.values()
        expected = frozenset(
            {*self._good.models, *(one.manifest.model for one in records if one.phase is Phase.ACTIVE)}
        )
        if self._is_ready and expected != self._expected and self._worker.send(Expect(tuple(sorted(expected)))):
            self._expected = expected

    def said(self, message: FromWorker) -> None:
        """Take the worker's word."""
        match message:
            case Ready():
                log.info("the local inference API is at %s", message.url)
                self._ready_at = time.monotonic()
                self._is_ready = True
                self._expected = None
                if self._ensembles:
                    self._worker.send(Declare(self._ensembles))
                self._expect()
                self._carry_out(self._updater.worker_ready())
            case Loaded():
                self._load_answered(message)
            case GrpcServed():
                self._condition.grpc_served(message.address, message.problem)
            case Window():
                counted = msgspec.structs.replace(message, models=self._crashes.added_to(message.models))
                self._window(counted, self._collects.pop(message.request_id, time.time()))
            case Peeked():
                self._watchdog.answered(message)
                self._probation.counted(message, time.monotonic())
            case Activated():
                self._activated(message)
            case Exposed():
                self._exposed(message)
            case Unservable():
                self._ensemble_health.said(message.ensembles, time.monotonic())

    def _load_answered(self, message: Loaded) -> None:
        if self._stand_ins.asked(message.request_id):
            self._stand_in_answered(message)
            return
        deployment_id = self._loads.pop(message.request_id, None)
        self._load_since.pop(deployment_id or "", None)
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
            self._switched(serving.deployment_id)
            self._changed()
        elif serving is not None:
            log.error("the worker has no %s@%s to answer with; it is loaded again", serving.model, serving.version)
            record = self._updater.records.get(serving.deployment_id)
            if record is not None and record.phase not in ENDED:
                self.load(record)

    def do(self, effect: LoadArtifact | ActivateArtifact | BeginProbation | ExposeArtifact, record: Record) -> None:
        """Do what the updater wants of the worker, for a deployment."""
        match effect:
            case LoadArtifact():
                self.load(record)
            case ActivateArtifact():
                self.activate(record)
            case BeginProbation():
                self.begin_probation(record, effect.before_id)
            case ExposeArtifact():
                self.expose(record, effect.before_id)

    def load(self, record: Record) -> None:
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
        self._load_since[record.deployment_id] = time.monotonic()
        self._worker.send(
            Load(
                self._request_id,
                record.deployment_id,
                record.manifest,
                str(self._store.path(digest)),
                golden_path=str(self._store.path(golden.digest)) if tried and golden is not None else "",
                need_mb=_needed_mb(record) if tried else 0.0,
                compiled=str(self._store.compiled(digest)),
                may_fall_back=not tried or self._may_fall_back(record),
            )
        )

    def _may_fall_back(self, record: Record) -> bool:
        policy = record.watching.on_provider_missing
        if policy is OnProviderMissing.KEEP_OLD:
            return self._updater.active(record.manifest.model) is None
        return policy is OnProviderMissing.FALL_BACK

    def activate(self, record: Record) -> None:
        """Let the worker answer with a loaded artifact."""
        manifest, loaded = record.manifest, self._loaded.get(record.deployment_id)
        if loaded is None:
            return
        self._beside.pop(record.deployment_id, None)
        self._let_serve(manifest, record.deployment_id, loaded)

    def _let_serve(self, manifest: Manifest, deployment_id: str, loaded: Loaded) -> None:
        serving = {one.deployment_id for one in (*self._serving.values(), *self._activations.values())}
        self._manifests = {key: one for key, one in self._manifests.items() if key in serving}
        self._manifests[deployment_id] = manifest
        self._request_id += 1
        self._activations[self._request_id] = ServingReport(
            manifest.model,
            manifest.version,
            manifest.digest,
            deployment_id,
            loaded.runtime,
            loaded.provider,
            loaded.load_s,
            loaded.fell_back,
        )
        self._worker.send(Activate(self._request_id, manifest.model, manifest.digest))

    def begin_probation(self, record: Record, before_id: str | None) -> None:
        """Watch a version, beside the one before it."""
        self._watch(record, record.watching, before_id, self._loaded[record.deployment_id])

    def _watch(self, record: Record, policy: ProbationPolicy, before_id: str | None, loaded: Loaded) -> None:
        self._probation.begin(
            record.deployment_id,
            policy,
            time.monotonic(),
            before_id=before_id,
            before_mb=loaded.before_mb,
            provider=loaded.provider,
            note=fall_back(loaded.provider, loaded.fell_back),
        )

    def expose(self, record: Record, before_id: str) -> None:
        """Let a loaded version run beside the one that serves, and watch it, as long as the server wants it to.

        What is a copy runs at low priority: how fast it is says nothing against it.
        """
        exposure, loaded = record.exposure, self._loaded.get(record.deployment_id)
        if exposure is None or loaded is None:
            return
        self._request_id += 1
        self._exposures[self._request_id] = (record.deployment_id, exposure)
        self._worker.send(Expose(self._request_id, record.manifest.model, record.manifest.digest, exposure))
        ratio = 0.0 if exposure.mode is ExposureMode.SHADOW else record.watching.latency_ratio
        policy = msgspec.structs.replace(record.watching, seconds=LIMITS.seconds, at_most_s=0.0, latency_ratio=ratio)
        self._watch(record, policy, before_id, loaded)

    def _exposed(self, message: Exposed) -> None:
        deployment_id, exposure = self._exposures.pop(message.request_id)
        record = self._updater.records.get(deployment_id)
        if record is None or record.phase is not Phase.EXPOSED:
            return
        if message.ok:
            self._beside[deployment_id] = exposure
            self._changed()
        else:
            log.error("the worker has no %s@%s to run beside; it is loaded again", *_name(record.manifest))
            self.load(record)

    def end_probation(self, deployment_id: str) -> None:
        """Watch a version no more."""
        self._probation.end(deployment_id)
        self._beside.pop(deployment_id, None)

    def unload(self, model: str, digest: str) -> None:
        """Let the worker forget an artifact; if it says later that this was swapped in, that is over already."""
        self._worker.send(Unload(model, digest))
        self._stand_ins.unloaded(model, digest)
        going = [key for key, one in self._activations.items() if (one.model, one.digest) == (model, digest)]
        for key in going:
            del self._activations[key]
        serving = self._serving.get(model)
        swapping = any(one.model == model for one in self._activations.values())
        if serving is not None and serving.digest == digest and not swapping:
            del self._serving[model]

    def collect(self) -> None:
        """Ask the worker what models did since the last time."""
        self._request_id += 1
        self._collects[self._request_id] = self._window_started
        self._window_started = time.time()
        self._worker.send(Collect(self._request_id))

    def tick(self) -> None:
        """Start a worker that is due; judge what is watched; let earlier versions stand in where nothing serves."""
        now = time.monotonic()
        self._expect()
        self._ensemble_health.tick(now)
        if self._start_at is not None and now >= self._start_at:
            self._start_at = None
            self.start()
        if self.replacement is not None and self.replacement.kills(now):
            self._worker.kill()
        busy = not self._is_ready or self._loads or self._stand_ins.loading
        if busy:
            self._watchdog.rest()
        if now - self._said_loading >= LOADING_S and any(map(self.loading_s, self._loads.values())):
            self._said_loading = now
            self._changed()
        if self._probation.asks(now) or (not busy and self._watchdog.asks(now)):
            self._request_id += 1
            self._worker.send(Peek(self._request_id))
        for over in self._probation.tick(now):
            self._carry_out(self._updater.probation_over(over.deployment_id, problem=over.problem, report=over.report))
            if over.silent:
                self._end_hanging(over.problem or "")
        hangs = None if self._hung else self._watchdog.hangs()
        if hangs is not None:
            self._end_hanging(hangs)
        self._stand_in()

    def _end_hanging(self, why: str) -> None:
        self._hung = True
        self._watchdog.rest()
        self._condition.worker_hung(why)
        self._worker.kill()

    def _count_crash(self) -> None:
        """The worker died: it is counted for what was being loaded or watched, or else for all that served."""
        keys = {*self._loads.values(), *self._probation.watched}
        tried = {key: record.manifest for key in keys if (record := self._updater.records.get(key)) is not None}
        tried |= {good.deployment_id: good.manifest for good in self._stand_ins.loading}
        for key, manifest in tried.items():
            provider = self._loaded[key].provider if key in self._loaded else ""
            self._crashes.count(manifest.model, manifest.version, manifest.digest, key, provider)
        for one in () if tried else self._serving.values():
            self._crashes.count(one.model, one.version, one.digest, one.deployment_id, one.provider)

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()

    @property
    def pid(self) -> int:
        """The worker's process; 0 where there is none."""
        return self._worker.pid

    def hand_over(self, *, answering: bool) -> tuple[list[int], int | None]:
        """Give the sockets up, and with `answering` the worker too: `WorkerProcess.hand_over`."""
        return self._worker.hand_over(answering=answering)

    # -- what serves while what ought to can't

    def _stand_in(self) -> None:
        if self._is_ready:
            records = [self._updater.records.get(one) for one in self._loads.values()]
            loading = {record.manifest.model for record in records if record is not None}
            loading |= {serving.model for serving in self._activations.values()}
            self._stand_ins.tick({one.model: one.digest for one in self._serving.values()}, loading)

    def _load_stand_in(self, good: Good) -> int:
        self._request_id += 1
        path = str(self._store.path(good.manifest.digest))
        compiled = str(self._store.compiled(good.manifest.digest))
        self._worker.send(Load(self._request_id, good.deployment_id, good.manifest, path, compiled=compiled))
        return self._request_id

    def _stand_in_answered(self, message: Loaded) -> None:
        good = self._stand_ins.answered(message.request_id, ok=message.code is None)
        if good is None or good.manifest.model in self._serving or good.manifest.model not in self._good.models:
            return
        self._let_serve(good.manifest, good.deployment_id, message)
        active = self._updater.active(good.manifest.model)
        if active is None or active.deployment_id != good.deployment_id:
            self._condition.stands_in(good.manifest.model, good.manifest.version)


def _name(manifest: Manifest) -> tuple[str, str]:
    return manifest.model, manifest.version


def _needed_mb(record: Record) -> float:
    """Memory that loading a version beside what serves takes, in MiB: as it was measured, but no less than its file."""
    size = record.manifest.size / 2**20
    measured = record.watching.load_mb
    return MEMORY_LEFT_MB + max(size, 2 * size if measured is None else measured)
