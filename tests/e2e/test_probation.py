"""Versions that pass the gate and do badly on a device: it goes back by itself, and the server says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import numpy as np
import pytest

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import DataFile, Manifest
from agent.runtimes import open_runtime
from agent.trial import golden
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.models import Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.trust import service as trust
from tests.fleet import LocalFleet, wait_until, write_classifier
from tests.processes import descendants
from tests.traps import ARMED, write_deadly, write_trapped

ROW = np.eye(8, dtype=np.float32)[:1]
TRAPS = ("error", "crash", "slow", "leak")
STRATEGY = {"stages": [{"percent": 100}], "stop_when": [{"metric": "failed_percent", "above": 5}]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device that serves m@good, and versions with a trap each that are ready."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        for number, version in enumerate(("good", "other", *TRAPS)):
            path = fleet.folder / f"{version}.onnx"
            if version in TRAPS:
                write_trapped(path, version, seed=number, rounds=8000)
            else:
                write_classifier(
                    path, seed=number, hidden=16 if version == "good" else 2500
                )  # it takes its time to load
            fleet.push("m", version, path)
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@good")
        wait_until("m@good", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


class Client:
    """Asks a device's model all the time; `sprung` makes its rows spring traps, harder each time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sprung = False
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        above = 0.0
        with httpx.Client(timeout=60) as connection:
            while not self._stop.wait(0.02):
                row = ROW.copy()
                if self.sprung:
                    above += 1
                    row[0, 7] = ARMED + above
                tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": row.flatten().tolist()}
                try:
                    answer = connection.post(self.url, json={"inputs": [tensor]})
                    if answer.status_code == 200:
                        self.versions.append(answer.json()["model_version"])
                    else:
                        self.failures.append(answer.text)
                except httpx.TransportError as error:
                    self.failures.append(repr(error))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(70)


def client(fleet: LocalFleet) -> Client:
    return Client(f"http://127.0.0.1:{fleet.agent_ports['dev-1']}/v2/models/m/infer")


def serving(fleet: LocalFleet) -> list[str]:
    """What the server says the device runs."""
    return [one["version"] for one in fleet.get("/devices/dev-1")["serving"]]


def answers(fleet: LocalFleet) -> str | None:
    try:
        return str(fleet.infer("dev-1", "m", ROW)["model_version"])
    except (AssertionError, httpx.HTTPError):
        return None


def phase(fleet: LocalFleet, rollout: str, *wanted: str) -> dict[str, Any] | None:
    found = [one for one in fleet.deployments(rollout) if one["phase"] in wanted]
    return found[0] if found else None


def went_back(fleet: LocalFleet, rollout: str, ended: str = "rolled_back") -> dict[str, Any]:
    """The deployment that its device took back; the server has understood it."""
    deployment = wait_until("the device going back", lambda: phase(fleet, rollout, ended), 90)
    wait_until("the revert", lambda: fleet.rollout_state(rollout) == "reverted", 30)
    wait_until("the server to say so", lambda: serving(fleet) == ["good"], 30)
    assert answers(fleet) == "good"
    (settled,) = fleet.deployments(rollout)
    assert (settled["phase"], settled["desired"]) == (ended, False)
    counts = fleet.get(f"/rollouts/{rollout}")["counts"]
    assert (counts["failed"], counts["active"]) == (1, 0)
    return deployment


@pytest.mark.parametrize(
    ("trap", "probation", "code", "said"),
    [
        ("error", {}, "probation_failed", "requests failed while the version was watched"),
        ("crash", {}, "worker_crashed", "the inference worker died while the version was watched"),
        ("slow", {}, "probation_failed", "times that of the version before on this device"),
        ("leak", {"growth_mb": 30, "latency_p95_ratio": 0}, "probation_failed", "did not stop growing"),
        ("leak", {"memory_mb": 100, "growth_mb": 0, "latency_p95_ratio": 0}, "probation_failed", "100 MiB are allowed"),
    ],
)
def test_the_device_goes_back_by_itself_and_the_server_says_so(
    fleet: LocalFleet, trap: str, probation: dict[str, Any], code: str, said: str
) -> None:
    with client(fleet) as asking:
        wait_until("traffic", lambda: len(asking.versions) > 50)
        probation = {"seconds": 40, **probation}
        rollout = fleet.rollout(f"m@{trap}", strategy={**STRATEGY, "probation": probation})
        wait_until("probation", lambda: trap in asking.versions)
        assert asking.failures == []
        asking.sprung = True
        deployment = went_back(fleet, rollout)
        asking.sprung = False
        before = len(asking.failures)
        wait_until("answers", lambda: asking.versions[-1] == "good")
    assert deployment["failure"]["code"] == code
    assert said in deployment["failure"]["detail"]
    seen = deployment["probation"]
    assert seen["provider"] == "cpu"
    assert seen["requests"] > 0 or trap == "crash"
    if trap in {"slow", "leak"}:
        assert before == 0, "going back lost a request"
        assert (seen["errors"], seen["exercised"]) == (0, True)
    if trap == "slow":
        assert seen["latency_p95_ms"] > 2 * seen["before_p95_ms"]


def test_a_version_that_was_taken_back_is_not_tried_again(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@error", strategy={**STRATEGY, "stop_when": [], "probation": {"seconds": 40}})
    with client(fleet) as asking:
        wait_until("probation", lambda: "error" in asking.versions)
        asking.sprung = True
        wait_until("the device going back", lambda: phase(fleet, rollout, "rolled_back"))
    wait_until("the end", lambda: fleet.rollout_state(rollout) == "stopped")
    for restart in ("dev-1", "server"):
        fleet.kill(restart)
        fleet.start_agent("dev-1") if restart == "dev-1" else fleet.start_server()
        wait_until("m@good", lambda: answers(fleet) == "good")
        wait_until("the server to say so", lambda: serving(fleet) == ["good"], 30)
    (deployment,) = fleet.deployments(rollout)
    assert deployment["phase"] == "rolled_back"
    assert fleet.log("dev-1").count("m@error is probation") == fleet.log("dev-1").count("m@error is rolled_back")


def test_after_a_crash_in_probation_the_old_one_serves_first_and_the_new_one_is_tried_again(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@other", strategy={**STRATEGY, "probation": {"seconds": 6}})
    wait_until("probation", lambda: answers(fleet) == "other")
    fleet.kill("dev-1")
    wait_until("its worker's end", lambda: answers(fleet) is None)
    with client(fleet) as asking:
        fleet.start_agent("dev-1")
        wait_until("the new one", lambda: "other" in asking.versions)
    assert asking.versions[0] == "good"
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    (deployment,) = fleet.deployments(rollout)
    assert not deployment["probation"]["exercised"], "a few requests prove nothing, and it says so"
    back = fleet.rollout("m@good", strategy=STRATEGY)
    wait_until("m@good", lambda: fleet.rollout_state(back) == "succeeded")


@contextmanager
def variant_of(fleet: LocalFleet, version: str) -> Iterator[Variant]:
    """The server's row of a variant, to be changed; its manifest is signed anew."""
    database = Database(Settings(state_dir=fleet.folder / "server").effective_database_url)
    (row,) = fleet.get("/variants", version=f"m@{version}")["items"]
    with database.write() as session:
        variant = session.get_one(Variant, row["id"])
        yield variant
        manifest = msgspec.convert(variant.manifest, Manifest)
        assert manifest.golden is not None
        catalog.keep_candidates(session, variant, {manifest.digest, manifest.golden.digest})
        trust.want(session, DEFAULT_FLEET, manifest)
    database.dispose()


def store_of(fleet: LocalFleet) -> ArtifactStore:
    settings = Settings(state_dir=fleet.folder / "server")
    return ArtifactStore.open(settings.effective_artifacts_url, folder=settings.state_dir / "artifacts")


def test_a_version_that_answers_otherwise_than_it_did_at_its_build_never_serves(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    store = store_of(fleet)
    with variant_of(fleet, "slow") as variant:
        manifest = msgspec.convert(variant.manifest, Manifest)
        assert manifest.golden is not None, "builds make golden inputs"
        store.fetch_to(manifest.golden.digest, tmp_path / "golden")
        rows = golden.read(tmp_path / "golden", manifest).rows
        assert len(rows) == golden.ROWS
        write_classifier(tmp_path / "wrong", right=False)
        theirs = golden.answer_rows(open_runtime(manifest, tmp_path / "wrong"), rows)
        golden.write(golden.made(rows, theirs, theirs), tmp_path / "other")
        digest, size = store.put_file(tmp_path / "other")
        changed = msgspec.structs.replace(manifest, golden=DataFile(digest, size, LIMITS.chunk_bytes))
        variant.manifest = msgspec.to_builtins(changed)
    with client(fleet) as asking:
        rollout = fleet.rollout("m@slow", strategy=STRATEGY)
        deployment = went_back(fleet, rollout, "failed")
    assert deployment["failure"]["code"] == "golden_mismatch"
    assert "output 'scores', row 0 of the golden inputs: the answer is" in deployment["failure"]["detail"]
    assert "on cpu by onnxruntime" in deployment["failure"]["detail"]
    assert (asking.failures, set(asking.versions)) == ([], {"good"})


def test_a_version_that_ends_the_worker_at_load_never_serves(fleet: LocalFleet, tmp_path: Path) -> None:
    write_deadly(tmp_path / "deadly")
    digest, size = store_of(fleet).put_file(tmp_path / "deadly")
    with variant_of(fleet, "crash") as variant:
        manifest = msgspec.convert(variant.manifest, Manifest)
        variant.manifest = msgspec.to_builtins(msgspec.structs.replace(manifest, digest=digest, size=size))
        variant.digest = digest
    rollout = fleet.rollout("m@crash", strategy=STRATEGY)
    deployment = went_back(fleet, rollout, "failed")
    assert deployment["failure"]["code"] == "worker_crashed"


def test_a_worker_that_no_longer_answers_is_ended_and_the_old_one_is_back(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@error", strategy={**STRATEGY, "probation": {"seconds": 60}})
    wait_until("probation", lambda: answers(fleet) == "error")
    descendants(fleet.processes["dev-1"].pid, "agent.serving.worker")[0].suspend()
    deployment = went_back(fleet, rollout)
    assert "did not answer for 20 s" in deployment["failure"]["detail"]


@pytest.mark.parametrize("on_memory_short", ["refuse", "replace"])
def test_where_two_do_not_fit_the_old_one_goes_on_or_comes_back(fleet: LocalFleet, on_memory_short: str) -> None:
    with variant_of(fleet, "leak") as variant:
        variant.measurements = {**(variant.measurements or {}), "memory_mb": 1e8}
    probation = {"on_memory_short": on_memory_short}
    with client(fleet) as asking:
        rollout = fleet.rollout("m@leak", strategy={**STRATEGY, "probation": probation})
        deployment = went_back(fleet, rollout, "failed")
        wait_until("answers", lambda: asking.versions[-1] == "good")
    assert deployment["failure"]["code"] == "memory_short"
    assert "needs 100000016 MiB" in deployment["failure"]["detail"]
    assert bool(asking.failures) == (on_memory_short == "replace"), (
        "only where it was allowed nothing answers meanwhile"
    )


def test_a_first_version_that_does_badly_is_taken_off(fleet: LocalFleet) -> None:
    fleet.start_agent("dev-2")
    wait_until("the device", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 2)
    rollout = fleet.rollout("m@error", target={"devices": ["dev-2"]}, strategy=STRATEGY)
    url = f"http://127.0.0.1:{fleet.agent_ports['dev-2']}/v2/models/m/infer"
    with Client(url) as asking:
        asking.sprung = True
        wait_until("the device going back", lambda: phase(fleet, rollout, "rolled_back"))
    wait_until("the revert", lambda: fleet.rollout_state(rollout) == "reverted")
    wait_until("nothing", lambda: fleet.get("/devices/dev-2")["serving"] == [])
    assert httpx.post(url, json={}).status_code == 404
    fleet.kill("dev-2")


def test_what_a_rollout_says_of_probation_is_checked_and_the_field_is_named(fleet: LocalFleet) -> None:
    create = partial(fleet.post, "/rollouts", status=422)
    for probation, field, said in (
        ({"seconds": -1}, "seconds", "greater than or equal to 0"),
        ({"seconds": 60, "at_most_s": 30}, "probation", "at_most_s: it must be at least `seconds`; leave it out"),
        ({"latency_p95_ratio": 0.5}, "probation", "give 0 for no bound"),
        ({"error_percent": 101}, "error_percent", "less than or equal to 100"),
        ({"second": 5}, "second", "there is no such field"),
    ):
        body = {"version": "m@good", "target": {"all": True}, "strategy": {**STRATEGY, "probation": probation}}
        problem = create(body)
        assert field in problem["problems"][0]["field"]
        assert said in problem["problems"][0]["detail"], problem
