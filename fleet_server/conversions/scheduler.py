"""Runs conversion jobs: threads that claim a row, have it built, and write down what came of it."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from pathlib import Path

from agent.protocol.manifest import ModelFormat, RuntimeName
from converters.job import BaselineArtifact, BuildJob, BuildResult, JobError, Progress, SourceFile
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import SourceFormat, TrainingPlan
from fleet_server.catalog.service import processing_of, sweep_uploads
from fleet_server.clock import utc_now
from fleet_server.conversions import service
from fleet_server.conversions.cache import sweep_cache
from fleet_server.conversions.executor import (
    EXCHANGE,
    BuildOrder,
    Executor,
    NotYetError,
    ProcessExecutor,
    WorkerLostError,
)
from fleet_server.conversions.files import WorkFolder, data_name, file_name, sweep_work_folders, work_folder
from fleet_server.conversions.process import CancelledError, ConversionFailedError
from fleet_server.conversions.resources import needs_of
from fleet_server.conversions.service import ClaimedJob
from fleet_server.db import Database, new_id
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.errors import UnavailableError
from fleet_server.models import ConversionJob, Profile, Variant, Version
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
IDLE_S = 0.3
HEARTBEAT_S = 1.0
SWEEP_S = 3600.0
EXCHANGE_LIFETIME = dt.timedelta(days=1)
RETRY = dt.timedelta(seconds=3)


class ConversionScheduler:
    """The threads of this server that build variants."""

    def __init__(
        self, database: Database, artifacts: ArtifactStore, settings: Settings, executor: Executor | None = None
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._executor = executor or _executor(settings)
        self._owner = new_id()
        self._stopping = threading.Event()
        self._claiming = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._swept_at = 0.0

    def start(self) -> None:
        """Begin to claim jobs."""
        for number in range(self._settings.effective_conversion_workers):
            thread = threading.Thread(target=self._loop, name=f"conversion-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Kill running builds and give their jobs back."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        self._executor.close()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                claimed = self._next()
                if claimed is not None:
                    self._run(claimed)
            except Exception:
                log.exception("a conversion thread failed; it goes on")
                self._stopping.wait(5.0)

    def _next(self) -> ClaimedJob | None:
        """Claim a job, or wait a moment where there is none: one thread asks for all that have nothing to do."""
        with self._claiming:
            if self._stopping.is_set():
                return None
            self._sweep()
            claimed = None
            if service.has_work(self._database):
                with self._database.write() as session:
                    claimed = service.claim(session, self._owner, utc_now())
            if claimed is None:
                self._stopping.wait(IDLE_S)
            return claimed

    def _sweep(self) -> None:
        if time.monotonic() - self._swept_at > SWEEP_S or self._swept_at == 0.0:
            self._swept_at = time.monotonic()
            sweep_uploads(self._database, self._artifacts, utc_now())
            sweep_work_folders(self._settings.state_dir / "conversions")
            exchange = self._artifacts.folder(EXCHANGE)
            exchange.delete(
                name for name, at in exchange.entries().items() if utc_now() - at.written_at > EXCHANGE_LIFETIME
            )
            self._sweep_cache()

    def _sweep_cache(self) -> None:
        try:
            sweep_cache(self._artifacts, self._settings.conversion_cache_mb * 1_000_000)
        except UnavailableError as error:
            log.warning("the cache of conversions could not be swept: %s", error.detail)

    def _run(self, claimed: ClaimedJob) -> None:
        beat = _Heartbeat(self._database, claimed)
        try:
            with work_folder(self._settings.state_dir / "conversions", self._artifacts) as folder:
                result = self._executor.build(
                    self._order(claimed),
                    folder,
                    on_progress=beat.progress,
                    keep_going=lambda: beat.keep() and not self._stopping.is_set(),
                )
                self._complete(claimed, folder, result)
            self._sweep_cache()
        except CancelledError:
            with self._database.write() as session:
                service.release(session, claimed)
        except NotYetError as reason:
            with self._database.write() as session:
                new = service.postpone(session, claimed, str(reason), utc_now() + RETRY, begun=reason.begun)
            if new:
                log.warning("variant %s waits: %s", claimed.variant_id, reason)
        except WorkerLostError:
            log.warning("the worker of variant %s died at attempt %d", claimed.variant_id, claimed.attempt)
            with self._database.write() as session:
                service.lose(session, claimed, utc_now())
        except ConversionFailedError as failed:
            self._fail(claimed, failed.error)
        except Exception as error:
            log.exception("building variant %s failed", claimed.variant_id)
            self._fail(claimed, JobError("internal", f"{type(error).__name__}: {error}"[:1000]))

    def _order(self, claimed: ClaimedJob) -> BuildOrder:
        with self._database.read() as session:
            variant = session.get_one(Variant, claimed.variant_id)
            version = session.get_one(Version, variant.version_id)
            profile = session.get_one(Profile, variant.profile_id)
            forms = catalog.source_forms(session, version.id)
            baseline = service.baseline_of(session, version, variant.profile_id)
            plan = session.get_one(ConversionJob, claimed.job_id).training
        spec = ProfileSpec.model_validate(variant.profile_spec)
        compared = None
        if baseline is not None:
            name, manifest = baseline
            compared = BaselineArtifact(
                version=name,
                path=file_name(manifest.digest, f".{manifest.format.value}"),
                format=manifest.format,
                inputs=manifest.inputs,
                outputs=manifest.outputs,
                processing=manifest.processing,
            )
        weights = next((form for form in forms if form.format == SourceFormat.SAFETENSORS), None)
        training = None
        if plan is not None and weights is not None:
            training = service.training_order(version, TrainingPlan.model_validate(plan), weights)
        job = BuildJob(
            sources=tuple(
                SourceFile(ModelFormat(form.format), form.digest, file_name(form.digest, f".{form.format}"))
                for form in forms
                if form is not weights
            ),
            training=training,
            weights=service.weights_name(version, weights) if weights and spec.runtime == RuntimeName.TORCH else None,
            target=service.build_target(profile.name, spec),
            calibration=data_name(version.calibration_digest),
            evaluation=data_name(version.evaluation_digest),
            baseline=compared,
            processing=processing_of(version),
        )
        return BuildOrder(claimed.job_id, claimed.attempt, job, needs_of(spec))

    def _complete(self, claimed: ClaimedJob, folder: WorkFolder, result: BuildResult) -> None:
        """Store the artifacts first, then the rows that name them; an artifact nothing names is thrown away."""
        named = (name for one in service.gate_candidates(result) for name in one.files)
        files = [folder.path / Path(name).name for name in named]
        built = {self._artifacts.put_file(file)[0]: file for file in files}
        with self._database.write() as session:
            held = service.heartbeat(session, claimed, utc_now(), 1.0, "gate")
            before = catalog.candidate_digests(session, claimed.variant_id)
            state = service.complete(session, claimed, result, utc_now()).value if held else "no longer wanted"
            session.flush()
            unnamed = {digest for digest in {*built, *before} if not catalog.is_kept(session, digest)}
            for digest in unnamed:
                self._artifacts.delete(digest)
        for digest in built.keys() - unnamed:
            # Another build may have thrown the same bytes away before our rows were there; the rows now protect them.
            self._artifacts.put_file(built[digest])
        log.info("variant %s is %s", claimed.variant_id, state)

    def _fail(self, claimed: ClaimedJob, error: JobError) -> None:
        with self._database.write() as session:
            service.fail(session, claimed, error, utc_now())


def _executor(settings: Settings) -> Executor:
    if settings.dask_scheduler is None:
        return ProcessExecutor(settings)
    from fleet_server.conversions.cluster import DaskExecutor

    return DaskExecutor(settings)


class _Heartbeat:
    """Writes progress and lease to the row, at most every second."""

    def __init__(self, database: Database, claimed: ClaimedJob) -> None:
        self._database = database
        self._claimed = claimed
        self._newest = Progress(0.0, "starting")
        self._written_at = 0.0
        self._held = True

    def progress(self, newest: Progress) -> None:
        self._newest = newest

    def keep(self) -> bool:
        """Whether the job is still ours."""
        if time.monotonic() - self._written_at > HEARTBEAT_S:
            self._written_at = time.monotonic()
            with self._database.write() as session:
                newest = self._newest
                self._held = service.heartbeat(session, self._claimed, utc_now(), newest.fraction, newest.step)
        return self._held
