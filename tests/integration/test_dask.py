"""Builds on a real Dask cluster: workers are killed, lack what is needed, and come and go with their scheduler.

What the cluster is told of the queue passes through the scheduler's statements, which `test_scheduler` runs on both
databases; here both are used where two servers hold the same row. Tests that leave their cluster as it was share one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.service import add_upload
from fleet_server.clock import utc_now
from fleet_server.conversions import service
from fleet_server.conversions.executor import EXCHANGE
from fleet_server.db import Database
from fleet_server.models import ConversionJob
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from tests.cluster import Cluster
from tests.fleet import wait_until, write_classifier, write_data
from tests.integration.test_scheduler import Bench


class DaskBench(Bench):
    """A queue whose builds are real, on a cluster."""

    def __init__(self, database: Database, folder: Path, cluster: Cluster) -> None:
        super().__init__(database, folder)
        self.cluster = cluster
        self.settings = Settings(state_dir=folder / "state", dask_scheduler=cluster.url)
        self.store = ArtifactStore.open(None, folder=folder / "state" / "artifacts")
        write_classifier(folder / "model.onnx")
        write_data(folder / "evaluation.npz", rows=200, seed=1)
        self.source = add_upload(database, self.store, DEFAULT_FLEET, folder / "model.onnx", actor="test").digest
        self.evaluation = add_upload(
            database, self.store, DEFAULT_FLEET, folder / "evaluation.npz", actor="test"
        ).digest

    def step(self, variant_id: str, words: str) -> None:
        wait_until(f"step {words!r}", lambda: words in self.job(variant_id).step, 60)


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Iterator[DaskBench]:
    """With a cluster of its own, of which nothing is started."""
    cluster = Cluster(tmp_path)
    bench = DaskBench(database, tmp_path, cluster)
    yield bench
    for one in bench.running:
        one.stop()
    cluster.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and the worker `one`."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start_scheduler()
        cluster.start_worker("one")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def shared(database: Database, tmp_path: Path, cluster: Cluster) -> Iterator[DaskBench]:
    """With the cluster that tests share."""
    bench = DaskBench(database, tmp_path, cluster)
    yield bench
    for one in bench.running:
        one.stop()


ONE_DATABASE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@ONE_DATABASE
def test_a_build_on_a_worker_is_what_a_build_here_is(shared: DaskBench) -> None:
    bench = shared
    variant_id = bench.ask()
    bench.start()
    variant = bench.settled(variant_id)
    assert variant.state == "ready", (variant.failure, bench.cluster.log("one"))
    assert variant.digest is not None
    assert bench.store.exists(variant.digest)
    assert variant.measurements is not None
    assert variant.measurements["accuracy"] == 1.0
    assert bench.job(variant_id).attempts == 1
    assert not variant.candidates[0]["reused"]
    again = bench.settled(bench.ask())
    assert again.candidates[0]["reused"], "the cache is one for all"
    wait_until("the exchange to be empty", lambda: not bench.store.folder(EXCHANGE).entries(), 10)


@ONE_DATABASE
def test_a_worker_that_was_started_by_dask_itself(bench: DaskBench) -> None:
    bench.cluster.start_scheduler()
    bench.cluster.start_plain_worker("plain", "SHOAL=1 GPU=1")
    variant_id = bench.ask(resources={"GPU": 1})
    bench.start()
    assert bench.settled(variant_id).state == "ready", bench.cluster.log("plain")


@ONE_DATABASE
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_a_build_by_tls(bench: DaskBench) -> None:
    files = bench.cluster.use_tls()
    ca, cert, key = (str(path) for path in files.values())
    bench.cluster.start_scheduler("--protocol", "tls", "--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)
    bench.cluster.start_worker("one", "--tls-ca", ca, "--tls-cert", cert, "--tls-key", key)
    bench.settings = Settings(state_dir=bench.settings.state_dir, dask_scheduler=bench.cluster.url, **files)
    variant_id = bench.ask()
    bench.start()
    assert bench.settled(variant_id).state == "ready", bench.cluster.log("one")


@ONE_DATABASE
def test_a_job_whose_worker_is_killed_is_built_by_another(bench: DaskBench) -> None:
    bench.cluster.start_scheduler()
    bench.cluster.start_worker("one")
    bench.cluster.start_worker("two")
    variant_id = bench.ask()
    bench.start()
    first = bench.cluster.building("one", "two")
    orphans = bench.cluster.builds(first)
    bench.cluster.kill(first)
    wait_until("its child's end", lambda: not any(map(psutil.Process.is_running, orphans)), 10)
    assert bench.settled(variant_id).state == "ready"
    job = bench.job(variant_id)
    assert (job.attempts, job.lost) == (2, 1)


@ONE_DATABASE
def test_a_job_that_needs_what_no_worker_has_says_so_and_waits_for_one(bench: DaskBench) -> None:
    bench.cluster.start_scheduler()
    wanting = bench.ask(resources={"GPU": 1, "compute_capability_8.7": 1})
    bench.start()
    bench.step(wanting, "waits: no worker: start one with `shoal worker`")
    bench.cluster.start_worker("plain")
    bench.step(wanting, "waits: no worker of 1 has GPU=1, compute_capability_8.7=1")
    other = bench.ask()
    assert bench.settled(other).state == "ready", "others pass it"
    assert bench.variant(wanting).state == "queued"
    bench.cluster.start_worker("gpu", "--resource", "GPU=1", "--resource", "compute_capability_8.7=1")
    assert bench.settled(wanting).state == "ready"
    assert bench.job(wanting).lost == 0


@ONE_DATABASE
def test_a_cancelled_build_is_ended_on_its_worker(shared: DaskBench) -> None:
    bench = shared
    variant_id = bench.ask()
    bench.start()
    bench.cluster.building("one")
    children = bench.cluster.builds("one")
    with bench.database.write() as session:
        service.cancel(session, DEFAULT_FLEET, variant_id, utc_now(), actor="ann")
    wait_until("the child's end", lambda: not any(map(psutil.Process.is_running, children)), 5)
    assert bench.variant(variant_id).state == "cancelled"
    again = bench.ask()
    assert bench.settled(again).state == "ready", "its worker goes on"


@ONE_DATABASE
def test_jobs_wait_for_a_scheduler_that_is_down_and_go_on_without_a_restart(
    bench: DaskBench, caplog: pytest.LogCaptureFixture
) -> None:
    variant_id = bench.ask()
    bench.start()
    bench.step(variant_id, f"waits: the Dask scheduler at {bench.cluster.url} does not answer")
    bench.cluster.start_scheduler()
    bench.cluster.start_worker("one")
    bench.cluster.building("one")
    children = bench.cluster.builds("one")
    bench.cluster.kill("scheduler")
    wait_until("the child's end", lambda: not any(map(psutil.Process.is_running, children)), 20)
    bench.step(variant_id, "does not answer")
    bench.cluster.start_scheduler()
    assert bench.settled(variant_id).state == "ready", bench.cluster.log("one")
    assert bench.job(variant_id).lost == 0
    said = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert len(said) == 2, "once for each time"


def test_a_server_that_takes_over_ends_what_the_first_left_on_the_cluster(shared: DaskBench) -> None:
    """The first server is alive, but its lease ran out: as after a long pause of its machine."""
    bench = shared
    variant_id = bench.ask()
    bench.start()
    bench.cluster.building("one")
    (first,) = bench.cluster.builds("one")
    with bench.database.write() as session:
        job = session.query(ConversionJob).filter_by(variant_id=variant_id).one()
        job.lease_owner, job.lease_until = "a paused server", utc_now()
    bench.start()
    most = 0
    while bench.variant(variant_id).state in {"queued", "building"}:
        most = max(most, len(bench.cluster.builds("one")))
        time.sleep(0.02)
    assert not first.is_running()
    assert (bench.variant(variant_id).state, most) == ("ready", 1)
    assert bench.job(variant_id).attempts == 2


@ONE_DATABASE
def test_a_worker_that_can_not_see_the_store_says_so(shared: DaskBench, tmp_path: Path) -> None:
    bench = shared
    variant_id = bench.ask()
    bench.settings = bench.settings.model_copy(update={"artifacts_url": (tmp_path / "elsewhere").as_uri()})
    bench.start()
    failure = bench.settled(variant_id).failure
    assert failure is not None
    assert failure["code"] == "worker_store"
    assert "SHOAL_ARTIFACTS_URL" in failure["detail"]
