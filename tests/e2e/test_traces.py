"""One rollout by the command line, over a real broker, to real agents: one trace from the command to the devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet import BIN, LocalFleet, wait_until, write_classifier
from tests.otlp_receiver import Collector, Received, collector

SERVER, CLIENT, PRODUCER, CONSUMER = 2, 3, 4, 5  # OTLP's kinds of span
STEPS = ("trust", "download", "verify", "load", "switch", "probation")
DEVICES = ("dev-1", "dev-2")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, receiver: Collector) -> Iterator[LocalFleet]:
    """Two devices and m@1 that is ready, every process with its log as JSON."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(
            SHOAL_OTLP_ENDPOINT=receiver.url,
            SHOAL_OTLP_METRICS="true",
            SHOAL_OTLP_INTERVAL_S="1",
            SHOAL_LOG_FORMAT="json",
            SHOAL_LOG_LEVEL="DEBUG",
        )
        for name in DEVICES:
            fleet.start_agent(name, tables='log_format = "json"\n')
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 2)
        for version in ("1", "2", "3"):
            write_classifier(fleet.folder / version, seed=int(version), hidden=600)
            fleet.push("m", version, fleet.folder / version)
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        yield fleet
    finally:
        fleet.stop()


def command(fleet: LocalFleet, *arguments: str, **variables: str) -> Any:
    done = subprocess.run(
        [BIN / "shoal", *arguments, "-o", "json"],
        env={**os.environ, "SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token, **variables},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_a_rollout_is_one_tree_from_the_command_to_what_devices_did(fleet: LocalFleet, receiver: Collector) -> None:
    made = command(
        fleet, "rollout", "create", "m@1", "--all", "--allow-unproven", "--probation", "1s", "--stages", "50%,100%",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
    )  # fmt: skip
    wait_until("the rollout", lambda: fleet.rollout_state(made["id"]) == "succeeded")
    root = wait_until("its root", lambda: [one for one in receiver.spans if one.name == "shoal rollout create"])[0]
    assert (root.service, root.kind, root.parent_id, root.failed) == ("shoal-cli", CLIENT, "", False)
    wait_until("all of it", lambda: [one for one in receiver.of(root.trace_id) if one.name == "rollout"])
    found = receiver.of(root.trace_id)
    ids = [one.span_id for one in found]
    assert len(ids) == len(set(ids)), "each span came once"
    by_id = {one.span_id: one for one in found}
    assert [one.name for one in found if one.parent_id not in by_id] == ["shoal rollout create"], "it is one tree"

    def path(span: Received) -> list[str]:
        names = []
        while True:
            names.insert(0, f"{span.service}: {span.name}")
            if not span.parent_id:
                return names
            span = by_id[span.parent_id]

    deployments = {one["id"]: one["device_id"] for one in fleet.deployments(made["id"])}
    assert sorted(deployments.values()) == list(DEVICES)
    above = [
        "shoal-cli: shoal rollout create", "shoal-server: POST /api/v1/rollouts", "shoal-server: rollout",
        "shoal-server: stage", "shoal-server: deployment", "shoal-server: publish desired", "shoal-agent: run m@1",
    ]  # fmt: skip
    for deployment, device in deployments.items():
        mine = [one for one in found if one.attributes.get("shoal.deployment") == deployment]
        assert {one.attributes["shoal.device"] for one in mine} == {device}
        [run] = [one for one in mine if one.name == "run m@1"]
        assert path(run) == above
        assert (run.kind, by_id[run.parent_id].kind) == (CONSUMER, PRODUCER)
        steps = sorted((one for one in mine if one.name in STEPS), key=lambda one: one.start)
        assert tuple(one.name for one in steps) == STEPS
        assert all(path(one)[:-1] == above for one in steps)
        assert steps[0].start == run.start
        for before, after in pairwise(steps):
            assert before.end == after.start
        assert 0.9 < steps[-1].end - steps[-1].start < 60, "it was watched for a second"
        assert next(one for one in mine if one.name == "deployment").start <= run.start
        reports = [one for one in mine if one.name.startswith("report ")]
        assert "report active" in {one.name for one in reports}
        assert all(path(one)[:-1] == above for one in reports if one.name == "report active")
    request = next(one for one in found if one.name == "POST /api/v1/rollouts")
    assert (request.kind, request.attributes["http.response.status_code"]) == (SERVER, 201)
    assert root.start <= request.start


def test_the_same_ids_are_in_the_logs_of_server_and_devices(fleet: LocalFleet, receiver: Collector) -> None:
    made = command(
        fleet, "rollout", "create", "m@2", "--all", "--allow-unproven", "--stages", "50%,100%",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
    )  # fmt: skip
    wait_until("the rollout", lambda: fleet.rollout_state(made["id"]) == "succeeded")
    deployments = {one["id"]: one["device_id"] for one in fleet.deployments(made["id"])}
    of_it = lambda: [one for one in receiver.spans if one.attributes.get("shoal.rollout") == made["id"]]  # noqa: E731
    trace = wait_until("its spans", of_it)
    ours = [json.loads(line) for line in fleet.log("server").splitlines()]
    decided = [one for one in ours if one.get("rollout") == made["id"]]
    assert {one["trace_id"] for one in decided if "trace_id" in one} == {trace[0].trace_id}
    for deployment, device in deployments.items():
        told = [json.loads(line) for line in fleet.log(device).splitlines()]
        assert {one["device"] for one in told} == {device}, "the worker's lines too"
        its = [one for one in told if one.get("deployment") == deployment]
        assert {one["message"] for one in its} >= {"m@2 is loading", "m@2 is active"}
        assert {one["trace_id"] for one in its} == {trace[0].trace_id}
        assert [one for one in ours if one.get("deployment") == deployment and one.get("device") == device]


def test_steps_before_a_power_cut_are_in_the_tree_of_those_after_it(fleet: LocalFleet, receiver: Collector) -> None:
    made = command(
        fleet, "rollout", "create", "m@3", "--device", "dev-1", "--allow-unproven", "--probation", "6s",
        "--stages", "100%", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
    )  # fmt: skip
    wait_until("the watching", lambda: [one["phase"] for one in fleet.deployments(made["id"])] == ["probation"])
    fleet.kill("dev-1")
    fleet.start_agent("dev-1")
    wait_until("the rollout", lambda: fleet.rollout_state(made["id"]) == "succeeded")
    of_it = lambda: [one for one in receiver.spans if one.attributes.get("shoal.rollout") == made["id"]]  # noqa: E731
    wait_until("all of it", lambda: [one for one in of_it() if one.name == "rollout"])
    [run] = [one for one in of_it() if one.name == "run m@3"]
    steps = sorted(
        (one for one in of_it() if one.parent_id == run.span_id and one.name in STEPS), key=lambda one: one.start
    )
    names = [one.name for one in steps]
    assert names[:5] == ["trust", "download", "verify", "load", "switch"]
    assert names[-3:] == ["load", "switch", "probation"], "it began again, and was watched anew"
    assert (steps[0].start, steps[-1].end) == (run.start, run.end)
    assert all(before.end == after.start for before, after in pairwise(steps))


def test_metrics_go_there_too_under_the_names_that_prometheus_reads(fleet: LocalFleet, receiver: Collector) -> None:
    def complete() -> dict[str, Any] | None:
        return receiver.metrics if "shoal_devices" in receiver.metrics else None

    pushed = wait_until("metrics", complete)
    scraped = httpx.get(f"{fleet.url}/metrics").text
    names = {line.split()[2] for line in scraped.splitlines() if line.startswith("# TYPE")}
    assert {one for one in pushed if not one.startswith("process_")} <= names
    online = {
        next(pair.value.string_value for pair in one.attributes if pair.key == "state"): one.as_double
        for one in pushed["shoal_devices"].gauge.data_points
    }
    assert online == {"online": 2.0, "offline": 0.0}
    histogram = pushed["shoal_database_statement_duration_seconds"].histogram.data_points[0]
    assert sum(histogram.bucket_counts) == histogram.count > 0
    assert len(histogram.explicit_bounds) == len(histogram.bucket_counts) - 1
    assert pushed["shoal_http_requests_total"].sum.is_monotonic


def test_whoever_runs_a_command_may_name_the_trace_that_it_belongs_to(fleet: LocalFleet, receiver: Collector) -> None:
    around = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    command(fleet, "device", "list", TRACEPARENT=around)
    found = wait_until("the request", lambda: receiver.of("0af7651916cd43dd8448eb211c80319c"))
    assert [(one.name, one.parent_id) for one in found] == [("GET /api/v1/devices", "b7ad6b7169203331")]
    command(fleet, "device", "list", TRACEPARENT=around.replace("1c80319c-", "1c80319d-")[:-2] + "00")
    command(fleet, "device", "list", TRACEPARENT=around.replace("1c80319c-", "1c80319e-"))
    wait_until("the last", lambda: receiver.of("0af7651916cd43dd8448eb211c80319e"))
    assert receiver.of("0af7651916cd43dd8448eb211c80319d") == [], "what is not sampled is not recorded"


def test_a_collector_that_is_away_or_refuses_disturbs_no_command(fleet: LocalFleet) -> None:
    with collector(refuse=True) as refusing:
        assert command(fleet, "device", "list", OTEL_EXPORTER_OTLP_ENDPOINT=refusing.url)
        assert refusing.refused
    assert command(fleet, "device", "list", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")


def test_without_a_collector_the_server_loads_nothing_of_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.rest import serving\n"
        "with serving(Path(sys.argv[1]), None): print([one for one in sys.argv[2:] if one in sys.modules])"
    )
    root, modules = Path(__file__).parents[2], ("opentelemetry.sdk", "opentelemetry.exporter", "google.protobuf")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *modules],
        cwd=root,
        env={**kept, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "[]"
