"""Conversion jobs from the queue to the variant, on SQLite and PostgreSQL, with builds that only pretend."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import DataFile, Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from converters.job import BuildResult, Candidate, GoldenFile, JobError, Measurements, Progress
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import VariantBuild
from fleet_server.catalog.service import add_upload, delete_version, sweep_uploads
from fleet_server.clock import utc_now
from fleet_server.conversions import scheduler, service
from fleet_server.conversions.executor import BuildOrder, Executor, NotYetError, WorkerLostError
from fleet_server.conversions.files import WorkFolder
from fleet_server.conversions.process import CancelledError, ConversionFailedError
from fleet_server.conversions.scheduler import ConversionScheduler
from fleet_server.db import Database
from fleet_server.devices.schemas import Budgets, ProfileCreate
from fleet_server.devices.service import create_profile
from fleet_server.models import Blob, ConversionJob, Model, SourceForm, Variant, Version
from fleet_server.preconditions import Precondition
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from tests.fleet import wait_until

BUILT = b"what every build makes"
DIGEST = hashlib.sha256(BUILT).hexdigest()
GOLDEN = b"rows and answers"
TENSOR = TensorSpec("x", "float32", (-1, 8))


class Build:
    """Stands for the child process: writes the same file each time, after what the test wants of it."""

    def __init__(self, before: Callable[[Callable[[], bool]], None] = lambda _: None) -> None:
        self._before = before
        self.orders: list[BuildOrder] = []
        self.folders: list[Path] = []

    def build(
        self,
        order: BuildOrder,
        folder: WorkFolder,
        *,
        on_progress: Callable[[Progress], None],
        keep_going: Callable[[], bool],
    ) -> BuildResult:
        self.orders.append(order)
        self.folders.append(folder.path)
        on_progress(Progress(0.5, "half way"))
        assert keep_going()
        self._before(keep_going)
        (folder.path / "built.onnx").write_bytes(BUILT)
        measured = Measurements(
            size=len(BUILT), samples=10, accuracy=0.9, macro_precision=None, macro_recall=None, macro_f1=None,
            classes=(), agreement=1.0, max_difference=0.0, latency_p50_ms=1.0, latency_p95_ms=1.0, memory_mb=1.0,
            provider="cpu",
        )  # fmt: skip
        candidate = Candidate(
            "recipe", Precision.FP32, path="built.onnx", digest=DIGEST, format=ModelFormat.ONNX, inputs=(TENSOR,),
            outputs=(TENSOR,), measurements=measured,
        )  # fmt: skip
        return BuildResult(measured, (candidate,), 0)

    def close(self) -> None:
        pass


class GoldenBuild(Build):
    """Its candidate has golden inputs."""

    def build(self, order: BuildOrder, folder: WorkFolder, **options: Any) -> BuildResult:
        result = super().build(order, folder, **options)
        (folder.path / "golden.npz").write_bytes(GOLDEN)
        golden = GoldenFile("golden.npz", hashlib.sha256(GOLDEN).hexdigest(), len(GOLDEN))
        (candidate,) = result.candidates
        return msgspec.structs.replace(result, candidates=(msgspec.structs.replace(candidate, golden=golden),))


class Forgetful(ArtifactStore):
    """A store in which somebody throws away what was just put there, once."""

    forgets = 1

    def put_file(self, path: Path) -> tuple[str, int]:
        digest, size = super().put_file(path)
        if self.forgets:
            self.forgets -= 1
            self.delete(digest)
        return digest, size


class Bench:
    """A queue with jobs, a store with their source, and schedulers that end with the test."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.settings = Settings(state_dir=folder / "state")
        self.store = ArtifactStore.open(None, folder=folder / "artifacts")
        self.running: list[ConversionScheduler] = []
        self.evaluation: str | None = None
        (folder / "source").write_bytes(b"source")
        self.source = add_upload(database, self.store, DEFAULT_FLEET, folder / "source", actor="test").digest

    def ask(self, *, resources: dict[str, float] | None = None, **budgets: float) -> str:
        """Ask for a variant of a version of its own."""
        with self.database.write() as session:
            number = str(session.query(Version).count())
            wanted = ProfileCreate(
                name=f"p{number}",
                runtime=RuntimeName.ONNX,
                precisions=[Precision.FP32],
                budgets=Budgets(accuracy_drop_points=None, **budgets),
                resources=resources,
            )
            create_profile(session, DEFAULT_FLEET, wanted, actor="test")
            model = Model(fleet_id=DEFAULT_FLEET, name=f"m{number}")
            session.add(model)
            session.flush()
            version = Version(
                fleet_id=DEFAULT_FLEET,
                model_id=model.id,
                name="1",
                inputs=[],
                outputs=[],
                evaluation_digest=self.evaluation,
            )
            session.add(version)
            session.flush()
            form = SourceForm(fleet_id=DEFAULT_FLEET, version_id=version.id, format="onnx", digest=self.source, size=6)
            session.add(form)
            session.flush()
            asked = VariantBuild(version=f"m{number}@1", profiles=[wanted.name])
            (variant,) = service.request_builds(session, DEFAULT_FLEET, asked, actor="test")
            return variant

    def start(self, build: Executor | None = None, store: ArtifactStore | None = None) -> ConversionScheduler:
        started = ConversionScheduler(self.database, store or self.store, self.settings, build)
        self.running.append(started)
        started.start()
        return started

    def variant(self, variant_id: str) -> Variant:
        with self.database.read() as session:
            return session.get_one(Variant, variant_id)

    def job(self, variant_id: str) -> ConversionJob:
        with self.database.read() as session:
            return session.query(ConversionJob).filter_by(variant_id=variant_id).one()

    def settled(self, variant_id: str) -> Variant:
        wait_until("the build", lambda: self.variant(variant_id).state not in {"queued", "building"}, 90)
        return self.variant(variant_id)


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(database, tmp_path)
    yield bench
    for one in bench.running:
        one.stop()


def test_a_build_that_passes(bench: Bench) -> None:
    variant_id = bench.ask()
    build = Build()
    bench.start(build)
    variant = bench.settled(variant_id)
    assert (variant.state, variant.digest, variant.size) == ("ready", DIGEST, len(BUILT))
    assert bench.store.read_range(DIGEST, 0, 1000) == BUILT
    job = bench.job(variant_id)
    assert (job.state, job.progress, job.step, job.lease_owner) == ("succeeded", 1.0, "done", None)
    (order,) = build.orders
    assert (order.job_id, order.attempt) == (job.id, 1)
    assert order.job.sources[0].path == f"{bench.source}.onnx"
    assert not build.folders[0].exists(), "its working folder is gone"


def test_golden_inputs_are_pinned_by_the_manifest_and_stay_as_long_as_their_version(bench: Bench) -> None:
    variant_id = bench.ask()
    bench.start(GoldenBuild())
    digest = hashlib.sha256(GOLDEN).hexdigest()
    manifest = msgspec.convert(bench.settled(variant_id).manifest, Manifest)
    assert manifest.golden == DataFile(digest, len(GOLDEN), LIMITS.chunk_bytes)
    sweep_uploads(bench.database, bench.store, utc_now() + dt.timedelta(days=30))
    assert bench.store.read_range(digest, 0, 1000) == GOLDEN
    names = {"fleet_id": DEFAULT_FLEET, "model_name": "m0", "name": "1"}
    delete_version(bench.database, bench.store, **names, actor="test", unchanged=Precondition(None))
    assert not bench.store.exists(digest)


def test_bytes_that_another_build_threw_away_are_put_back(bench: Bench, tmp_path: Path) -> None:
    variant_id = bench.ask()
    store = Forgetful.open(None, folder=tmp_path / "artifacts")
    bench.start(Build(), store)
    assert bench.settled(variant_id).state == "ready"
    wait_until("the artifact", lambda: bench.store.exists(DIGEST), 10)


def test_a_refused_build_keeps_its_bytes_only_for_devices_to_measure(bench: Bench) -> None:
    variant_id = bench.ask(latency_p95_ms=0.5)
    bench.start(Build())
    variant = bench.settled(variant_id)
    assert (variant.state, variant.digest, variant.manifest) == ("refused", None, None)
    assert bench.store.exists(DIGEST)
    with bench.database.read() as session:
        assert catalog.candidate_digests(session, variant_id) == {DIGEST}
    with bench.database.read() as session:
        assert [blob.digest for blob in session.query(Blob)] == [bench.source]


def test_a_refused_build_spares_an_upload_of_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(BUILT)
    add_upload(bench.database, bench.store, DEFAULT_FLEET, tmp_path / "upload", actor="test")
    variant_id = bench.ask(latency_p95_ms=0.5)
    bench.start(Build())
    assert bench.settled(variant_id).state == "refused"
    assert bench.store.exists(DIGEST)


def test_a_server_that_stops_gives_its_job_back(bench: Bench) -> None:
    variant_id = bench.ask()
    began = threading.Event()

    def until_told(keep_going: Callable[[], bool]) -> None:
        began.set()
        while keep_going():
            threading.Event().wait(0.01)
        raise CancelledError

    first = bench.start(Build(until_told))
    assert began.wait(30)
    first.stop()
    job = bench.job(variant_id)
    assert (job.state, job.lost, job.lease_owner) == ("queued", 0, None)
    assert bench.variant(variant_id).state == "queued"
    bench.start(Build())
    assert bench.settled(variant_id).state == "ready"


def test_a_job_whose_runner_went_silent_is_run_by_another(bench: Bench) -> None:
    variant_id = bench.ask()
    began, go_on = threading.Event(), threading.Event()

    def silent(_: Callable[[], bool]) -> None:
        began.set()
        assert go_on.wait(60)
        raise ConversionFailedError(JobError("late", "too late to matter"))

    bench.start(Build(silent))
    assert began.wait(30)
    with bench.database.write() as session:
        job = session.query(ConversionJob).filter_by(variant_id=variant_id).one()
        job.lease_until = utc_now()  # as if LEASE_S had gone by without a word
    bench.start(Build())
    assert bench.settled(variant_id).state == "ready"
    go_on.set()
    bench.running[0].stop()
    assert (bench.job(variant_id).attempts, bench.job(variant_id).lost) == (2, 1)
    assert bench.variant(variant_id).state == "ready"
    assert bench.variant(variant_id).failure is None


def test_a_cancelled_build_is_ended_and_can_be_asked_for_again(bench: Bench) -> None:
    variant_id = bench.ask()
    began, ended = threading.Event(), threading.Event()

    def until_told(keep_going: Callable[[], bool]) -> None:
        began.set()
        while keep_going():
            threading.Event().wait(0.01)
        ended.set()
        raise CancelledError

    bench.start(Build(until_told))
    assert began.wait(30)
    with bench.database.write() as session:
        service.cancel(session, DEFAULT_FLEET, variant_id, utc_now(), actor="ann")
    assert ended.wait(30)
    variant = bench.variant(variant_id)
    assert (variant.state, variant.digest) == ("cancelled", None)
    assert variant.failure == {"code": "cancelled", "detail": "ann cancelled its build: build it again to have it"}
    assert (bench.job(variant_id).state, bench.job(variant_id).lease_owner) == ("cancelled", None)
    bench.running[0].stop()
    with bench.database.write() as session:
        assert service.claim(session, "another", utc_now()) is None
        asked = VariantBuild(version="m0@1", profiles=["p0"])
        assert service.request_builds(session, DEFAULT_FLEET, asked, actor="test") == [variant_id]
    bench.start(Build())
    assert bench.settled(variant_id).state == "ready"


def test_a_build_that_was_done_as_it_was_cancelled_changes_nothing(bench: Bench) -> None:
    variant_id = bench.ask()

    def cancel(_: Callable[[], bool]) -> None:
        with bench.database.write() as session:
            service.cancel(session, DEFAULT_FLEET, variant_id, utc_now(), actor="ann")

    bench.start(Build(cancel))
    assert bench.settled(variant_id).state == "cancelled"
    bench.running[0].stop()
    assert bench.variant(variant_id).state == "cancelled"
    assert not bench.store.exists(DIGEST)


def test_a_job_waits_for_what_is_missing_and_lets_others_pass(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RETRY", dt.timedelta(seconds=0.3))
    waiting, other = bench.ask(), bench.ask()
    there = threading.Event()
    tries: list[str] = []

    class Picky(Build):
        def build(self, order: BuildOrder, folder: WorkFolder, **calls: Any) -> BuildResult:
            tries.append(order.job.target.profile)
            if order.job.target.profile == "p0" and not there.is_set():
                raise NotYetError("no worker has GPU=1")
            return super().build(order, folder, **calls)

    bench.start(Picky())
    assert bench.settled(other).state == "ready"
    wait_until("some tries", lambda: tries.count("p0") >= 3, 30)
    wait_until("its step", lambda: bench.job(waiting).step == "waits: no worker has GPU=1", 10)
    assert [record.getMessage() for record in caplog.records if "GPU" in record.getMessage()] == [
        f"variant {waiting} waits: no worker has GPU=1"
    ]
    there.set()
    assert bench.settled(waiting).state == "ready"
    assert (bench.job(waiting).attempts, bench.job(waiting).lost) == (1, 0)


@pytest.mark.parametrize(("deaths", "state"), [(service.ATTEMPTS - 1, "ready"), (service.ATTEMPTS, "failed")])
def test_a_job_whose_workers_die_is_run_again_until_it_is_given_up(bench: Bench, deaths: int, state: str) -> None:
    variant_id = bench.ask()
    build = Build()

    def die(_: Callable[[], bool]) -> None:
        if len(build.orders) <= deaths:
            raise WorkerLostError

    build._before = die
    bench.start(build)
    variant = bench.settled(variant_id)
    assert variant.state == state
    assert [order.attempt for order in build.orders] == list(range(1, min(deaths, 2) + 2))
    assert bench.job(variant_id).lost == deaths
    assert (variant.failure or {}).get("code") == (None if state == "ready" else "gave_up")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConversionFailedError(JobError("worker_died", "for lack of memory")), "worker_died"),
        (KeyError("a defect"), "internal"),
    ],
)
def test_a_build_that_fails_says_why_and_the_next_goes_on(bench: Bench, error: Exception, code: str) -> None:
    failing, good = bench.ask(), bench.ask()

    def fail_once(_: Callable[[], bool]) -> None:
        if bench.variant(good).state == "queued":
            raise error

    bench.start(Build(fail_once))
    variant = bench.settled(failing)
    assert variant.state == "failed"
    assert variant.failure is not None
    assert variant.failure["code"] == code
    assert variant.failure["detail"]
    assert bench.settled(good).state == "ready"
    with bench.database.write() as session:
        again = VariantBuild(version="m0@1", profiles=["p0"])
        assert service.request_builds(session, DEFAULT_FLEET, again, actor="test") == [failing]
    assert bench.settled(failing).state == "ready"
