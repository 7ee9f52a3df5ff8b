"""The REST API in this process, on SQLite and PostgreSQL: paging, problems, uploads, and what no database can hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from httpx2 import Response
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.testclient import TestClient

from agent.protocol.facts import DeviceFacts, RuntimeFacts
from agent.protocol.messages import HostWindow, Presence, Reported, TelemetryBatch
from agent.protocol.version import SPOKEN
from fleet_server.app import create_app, running
from fleet_server.catalog.schemas import UploadView, VersionCreate
from fleet_server.catalog.service import InspectionRecord
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import reports
from fleet_server.errors import InvalidError
from fleet_server.models import Deployment, Model, Profile, Rollout, Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.telemetry import service as telemetry
from tests import sqlite_file
from tests.databases import make_empty, short_on_sqlite
from tests.fleet import wait_until
from tests.reporting import record_report

TOKEN = "the-admin-of-tests"
JSON = {"Content-Type": "application/json"}
TENSOR = {"name": "x", "dtype": "float32", "shape": [-1, 8]}


class Inspector:
    """Stands for the child process that loads the files; refuses what it is told to."""

    refuse = False

    def inspect(self, wanted: VersionCreate, keep: Callable[[Path], UploadView]) -> InspectionRecord:
        if self.refuse:
            raise InvalidError("not_a_model", "sources.0: this is no model: push another", field="sources.0")
        return InspectionRecord(inputs=[TENSOR], outputs=[TENSOR], inspection={"samples": len(wanted.sources)})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """The application without a broker that answers, on either database."""
    folder = tmp_path_factory.mktemp("state")
    sqlite_file.put(folder)
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    app = create_app(
        Settings(
            state_dir=folder,
            database_url=url,
            broker_url="mqtt://127.0.0.1:1",
            conversion_workers=0,
            upload_max_mb=1,
            admin_token=TOKEN,
            request_burst=100_000,
        )
    )
    with running(app):
        yield app


@pytest.fixture
def database(application: FastAPI) -> Database:
    """Empty but for the default fleet."""
    database: Database = application.state.database
    with database.write() as session:
        make_empty(session)
    return database


@pytest.fixture
def inspector(application: FastAPI) -> Inspector:
    application.state.inspector = Inspector()
    return application.state.inspector  # type: ignore[no-any-return]


@pytest.fixture
def api(application: FastAPI, database: Database, inspector: Inspector) -> TestClient:
    """The server's errors come back as answers."""
    for path in kept_files(application):
        path.unlink()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(application, base_url="http://localhost/api/v1", headers=headers, raise_server_exceptions=False)


def kept_files(application: FastAPI) -> set[Path]:
    """Files in the artifact store, and uploads that are half there."""
    state: Path = application.state.settings.state_dir
    return {path for folder in ("artifacts", "uploads") for path in (state / folder).rglob("*") if path.is_file()}


def facts(**tags: str) -> DeviceFacts:
    return DeviceFacts(
        agent_version="1",
        os="",
        kernel="",
        arch="aarch64",
        cpu_model="",
        cpu_cores=4,
        cpu_features=("asimddp",),
        memory_mb=3800,
        disk_free_mb=1024,
        runtimes=(RuntimeFacts(name="onnx", package="onnxruntime", version="1.31.0", providers=("cpu",)),),
        tags=tags,
    )


def register(database: Database, device_id: str, sequence: int = 1, **tags: str) -> None:
    reported = Reported(protocol=SPOKEN, boot_id="b", sequence=sequence, revision=0, facts=facts(**tags))
    with database.write() as session:
        record_report(session, device_id, reported, utc_now())


def profile(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "match": {}, "runtime": "onnx", **fields}


def upload(api: TestClient, content: bytes) -> str:
    answer = api.post("/uploads", content=content)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["digest"])


def version(api: TestClient, model: str, name: str, content: bytes, **fields: Any) -> Response:
    sources = [{"format": "onnx", "digest": upload(api, content)}]
    return api.post(f"/models/{model}/versions", json={"name": name, "sources": sources, **fields})


def refused(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer, which must be a whole one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["detail"]
    assert problem["request_id"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


@short_on_sqlite("application")
def test_every_list_is_walked_by_cursor_and_by_link(api: TestClient, database: Database) -> None:
    for number in range(5):
        register(database, f"dev-{number}")
        assert api.post("/profiles", json=profile(f"p{number}")).status_code == 201
        assert version(api, "m", str(number), b"m").status_code == 201
        assert version(api, f"m{number}", "1", b"m").status_code == 201
        assert api.post("/variants", json={"version": "m@0", "profiles": [f"p{number}"]}).status_code == 202
        batch = TelemetryBatch(SPOKEN, "spool", number, 0.0, 1.0, (), HostWindow())
        with database.write() as session:
            assert telemetry.store_batch(session, "dev-0", batch, utc_now())
    add_rollouts(database, 5)
    lists = (
        *("/devices", "/profiles", "/models", "/models/m/versions", "/variants", "/rollouts", "/deployments"),
        *("/telemetry/hosts", "/audit-events"),
    )
    for path in lists:
        whole = api.get(path, params={"limit": 500}).json()["items"]
        assert len(whole) >= 5, path
        walked: list[Any] = []
        cursor: str | None = None
        following: str | None = f"/api/v1{path}?limit=2"
        while following is not None:
            answer = api.get(f"http://localhost{following}")
            assert answer.json() == api.get(path, params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
            walked += answer.json()["items"]
            cursor = answer.json()["next_cursor"]
            following = answer.links["next"]["url"] if "link" in answer.headers else None
            assert (cursor is None) == (following is None)
        assert walked == whole, path
        refused(api.get(path, params={"limit": 501}), 422, "invalid")
        refused(api.get(path, params={"cursor": "no cursor!"}), 422, "bad_cursor")


def add_rollouts(database: Database, count: int) -> None:
    """Rows of ended rollouts, each with one deployment: the engine has nothing to do with them."""
    with database.write() as session:
        variant = session.query(Variant).order_by(Variant.id).first()
        model = session.query(Model).filter_by(name="m").one()
        assert variant is not None
        target, strategy = {"all": True}, {"stages": [{"percent": 100}]}
        for _ in range(count):
            rollout = Rollout(fleet_id=DEFAULT_FLEET, name="r", version_id=variant.version_id, state="stopped",
                              target=target, strategy=strategy)  # fmt: skip
            session.add(rollout)
            session.flush()
            session.add(
                Deployment(fleet_id=DEFAULT_FLEET, rollout_id=rollout.id, device_id="dev-0", model_id=model.id,
                           version_id=variant.version_id, variant_id=variant.id, stage=0, phase="superseded")
            )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/devices/a%00b", {}),
        ("/models/a%00b", {}),
        ("/devices", {"profile": "a\0b"}),
        ("/variants", {"version": "a\0@1"}),
        ("/devices", {"cursor": "AGEA"}),
        ("/telemetry/models", {"since": "0001-01-01T00:00:00+14:00"}),
        ("/telemetry/models", {"until": "9999-12-31T23:59:59-14:00"}),
        ("/telemetry/hosts", {"cursor": "bm8gbnVtYmVy"}),
    ],
)
def test_addresses_that_no_database_can_look_for(api: TestClient, path: str, parameters: dict[str, str]) -> None:
    assert api.get(path, params=parameters or None).status_code == 422


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (422, b'{"name":"p","runtime":"onnx","match":{"memory_mb":{"min":Infinity}}}'),
        (422, b'{"name":"p","runtime":"onnx","match":{"memory_mb":NaN}}'),
        (422, b'{"name":"p","runtime":"onnx","match":{"memory_mb":1e999}}'),
        (422, b'{"name":"p","runtime":"onnx","budgets":{"latency_p95_ms":Infinity}}'),
        (422, b'{"name":"p","runtime":"onnx","match":{"arch":"\\u0000"}}'),
        (422, b'{"name":"p","runtime":"onnx","match":{"arch":["x","\\ud800"]}}'),
        (422, b'{"name":"p","runtime":"onnx","match":{"\\ud800":"x"}}'),
        (422, b'{"name":"p","runtime":"onnx","\\ud800":"x"}'),
        (400, b'{"name":"p","runtime":"onnx","match":{"memory_mb":' + b"9" * 5000 + b"}}"),
        (400, b"[" * 100_000),
        (400, b'{"name":"\xff","runtime":"onnx"}'),
    ],
)
def test_bodies_that_no_database_can_hold(api: TestClient, status: int, body: bytes) -> None:
    refused(api.post("/profiles", content=body, headers=JSON), status, "bad_body" if status == 400 else "invalid")
    assert api.get("/profiles").json()["items"] == []


@short_on_sqlite("application")
def test_a_problem_names_the_field_and_the_remedy(api: TestClient) -> None:
    wrong = refused(api.post("/profiles", json={"nmae": "p", "runtime": "An abacus", "threads": 0}), 422, "invalid")
    said = {one["field"]: one["detail"] for one in wrong["problems"]}
    assert set(said) == {"name", "nmae", "runtime", "threads"}
    assert "no such field" in said["nmae"]
    assert "add it" in said["name"]
    assert "'onnx'" in said["runtime"]
    assert "greater than or equal to 1" in said["threads"]
    unlabelled = refused(api.post("/profiles", content=b'{"name":"p"}'), 422, "invalid")
    assert "application/json" in unlabelled["detail"]
    refused(api.get("/nowhere"), 404, "not_found")
    refused(api.put("/profiles"), 405, "method_not_allowed")


@short_on_sqlite("application")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7470", "127.0.0.2", "[::1]:7470"])
def test_this_machine_by_any_name(api: TestClient, host: str) -> None:
    assert api.get("/devices", headers={"Host": host}).status_code == 200


@short_on_sqlite("application")
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.0.2.1", "", "[::2]"])
def test_a_strange_name_of_this_machine_is_refused(api: TestClient, host: str) -> None:
    refused(api.get("/devices", headers={"Host": host}), 400, "unknown_host")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (IntegrityError("insert", {}, ValueError("unique")), 409, "changed_meanwhile"),
        (OperationalError("select", {}, ValueError("locked")), 503, "database"),
        (KeyError("a defect"), 500, "internal"),
    ],
)
def test_errors_of_the_database_and_defects(
    api: TestClient,
    application: FastAPI,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    code: str,
) -> None:
    caplog.set_level("INFO")

    def failing() -> None:
        raise error

    application.add_api_route(f"/api/v1/failing/{code}", failing)
    problem = refused(api.get(f"/failing/{code}"), status, code)
    assert "defect" not in problem["detail"]
    assert problem["request_id"] in caplog.text


def is_blocked(database: Database) -> bool:
    with database.read() as session:
        waiting: int | None = session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        return waiting == 1


def test_two_that_create_the_same_at_once(api: TestClient, database: Database) -> None:
    """What a race looks like to the slower one: the row is there though it looked and saw none."""
    if database.is_sqlite:
        pytest.skip("SQLite lets one transaction write at a time")
    with ThreadPoolExecutor(1) as pool, database.write() as session:
        session.add(Profile(fleet_id=DEFAULT_FLEET, name="p", spec={}))
        session.flush()
        # The first has not committed yet: the second sees nothing, and waits for it at its own insert.
        second = pool.submit(api.post, "/profiles", json=profile("p"))
        wait_until("the second to wait", lambda: is_blocked(database), 30)
    refused(second.result(30), 409, "changed_meanwhile")


def test_an_upload_is_kept_whole_or_not_at_all(api: TestClient, application: FastAPI) -> None:
    content = b"x" * 1000
    digest = hashlib.sha256(content).hexdigest()
    assert api.post("/uploads", content=content, params={"sha256": digest}).json() == {"digest": digest, "size": 1000}
    kept = kept_files(application)
    assert len(kept) == 1
    assert upload(api, content) == digest

    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield b"y" * 100_000

    refused(api.post("/uploads", content=b"z" * (2 << 20)), 413, "upload_too_large")
    refused(api.post("/uploads", content=endless()), 413, "upload_too_large")
    refused(api.post("/uploads", content=b""), 422, "upload_empty")
    refused(api.post("/uploads", content=b"other", params={"sha256": digest}), 422, "upload_damaged")
    assert kept_files(application) == kept
    assert api.get(f"/artifacts/{digest}").content == content
    refused(api.get(f"/artifacts/{'0' * 64}"), 404, "artifact_not_found")


def test_a_version_never_changes(api: TestClient) -> None:
    first = version(api, "m", "1", b"one", labels=["cat"])
    assert first.status_code == 201
    assert version(api, "m", "1", b"one", labels=["cat"]).json() == first.json()
    refused(version(api, "m", "1", b"two", labels=["cat"]), 409, "version_exists")
    refused(version(api, "m", "1", b"one", labels=["dog"]), 409, "version_exists")
    refused(version(api, "m", "1", b"one", labels=["cat"], gate={"min_accuracy": 0.5}), 409, "version_exists")
    assert api.get("/models/m/versions/1").json() == first.json()
    assert api.get("/models/m").json()["latest_version"] == "1"


def test_a_refused_version_leaves_nothing(api: TestClient, application: FastAPI, inspector: Inspector) -> None:
    assert version(api, "kept", "1", b"shared").status_code == 201
    before = kept_files(application)
    inspector.refuse = True
    problem = refused(version(api, "m", "1", b"bad", calibration=upload(api, b"rows")), 422, "not_a_model")
    assert problem["problems"][0]["field"] == "sources.0"
    refused(version(api, "m", "1", b"shared"), 422, "not_a_model")
    assert kept_files(application) == before, "another version's file is kept, the refused ones are gone"
    refused(api.get("/models/m"), 404, "model_not_found")
    inspector.refuse = False
    missing = {"name": "1", "sources": [{"format": "onnx", "digest": "0" * 64}]}
    problem = refused(api.post("/models/m/versions", json=missing), 422, "upload_not_found")
    assert problem["problems"][0]["field"] == "sources.0.digest"


def test_devices_find_their_profiles(api: TestClient, database: Database) -> None:
    register(database, "a", line="3")
    register(database, "b")
    assert api.post("/profiles", json=profile("any")).status_code == 201

    def profiles() -> dict[str, str | None]:
        return {one["id"]: one["profile"] for one in api.get("/devices").json()["items"]}

    assert profiles() == {"a": "any", "b": "any"}
    # A number in YAML and a text on the command line mean the same fact, and so does a tag, which is always a text.
    for match in ({"cpu_cores": "4", "memory_mb": {"min": 2048}}, {"tags.line": 3}):
        assert api.post("/profiles", json=profile(f"p{len(match)}", match=match)).status_code == 201
    assert profiles() == {"a": "p2", "b": "p2"}
    assert api.patch("/devices/b", json={"profile": "p1"}).json()["profile_pinned"] is True
    register(database, "b", sequence=2)
    assert profiles() == {"a": "p2", "b": "p1"}
    assert api.delete("/profiles/p2").status_code == 204
    assert profiles() == {"a": "p1", "b": "p1"}
    assert api.patch("/devices/b", json={"profile": None}).json()["profile"] == "any"
    assert api.patch("/devices/b", json={"tags": {"line": "3"}}).json()["profile"] == "p1"
    assert [one["id"] for one in api.get("/devices", params={"profile": "p1"}).json()["items"]] == ["a", "b"]
    refused(api.patch("/devices/b", json={"profile": "nowhere"}), 404, "profile_not_found")
    refused(api.patch("/devices/nobody", json={"tags": {}}), 404, "device_not_found")


def test_a_runtime_that_nobody_knows_is_refused_until_a_device_has_it(api: TestClient, database: Database) -> None:
    refused(api.post("/profiles", json=profile("p", runtime="onnxruntme")), 422, "unknown_runtime")
    answer = refused(api.post("/profiles", json=profile("p", runtime="ligert")), 422, "unknown_runtime")
    assert "did you mean 'litert'?" in answer["detail"]
    assert "allow_unknown_runtime" in answer["detail"]
    assert [one["field"] for one in answer["problems"]] == ["runtime"]
    assert api.get("/profiles/p").status_code == 404
    taken = api.post("/profiles", json=profile("p", runtime="acme-npu", allow_unknown_runtime=True))
    assert taken.status_code == 201
    assert "allow_unknown_runtime" not in taken.json()["spec"]
    again = api.post("/profiles", json=profile("p", runtime="acme-npu"))
    assert again.json()["id"] == taken.json()["id"], "what is there already is no longer asked for"
    refused(api.post("/profiles", json=profile("q", runtime="acme-npu")), 422, "unknown_runtime")
    brought = msgspec.structs.replace(facts(), runtimes=(RuntimeFacts("acme-npu", "acme-runtime", "3.1", ("npu",)),))
    with database.write() as session:
        reported = Reported(protocol=SPOKEN, boot_id="b", sequence=1, revision=0, facts=brought)
        record_report(session, "has-it", reported, utc_now())
    assert api.post("/profiles", json=profile("q", runtime="acme-npu")).status_code == 201


def test_a_profile_that_is_used_stays_and_names_are_taken_once(api: TestClient) -> None:
    first = api.post("/profiles", json=profile("p"))
    assert api.post("/profiles", json=profile("p")).json() == first.json()
    refused(api.post("/profiles", json=profile("p", threads=2)), 409, "profile_exists")
    version(api, "m", "1", b"m")
    built = api.post("/variants", json={"version": "m@1", "profiles": ["p", "p"]})
    assert built.status_code == 202
    assert len(built.json()) == 1
    refused(api.delete("/profiles/p"), 409, "profile_in_use")
    assert api.delete("/models/m/versions/1").status_code == 204
    assert api.delete("/profiles/p").status_code == 204
    refused(api.delete("/profiles/p"), 404, "profile_not_found")


def test_only_a_build_that_goes_on_is_cancelled(api: TestClient) -> None:
    api.post("/profiles", json=profile("p"))
    version(api, "m", "1", b"m")
    variant = api.post("/variants", json={"version": "m@1", "profiles": ["p"]}).json()[0]["id"]
    cancelled = api.post(f"/variants/{variant}/cancel").json()
    assert (cancelled["state"], cancelled["job"]["state"]) == ("cancelled", "cancelled")
    refused(api.post(f"/variants/{variant}/cancel"), 409, "not_building")
    refused(api.post("/variants/nothing/cancel"), 404, "variant_not_found")
    newest = next(one for one in api.get("/audit-events").json()["items"] if one["actor"] != "server")
    assert (newest["action"], newest["detail"]) == ("variant.cancel", {"version": "m@1", "profile": "p"})
    asked = api.post("/variants", json={"version": "m@1", "profiles": ["p"]}).json()[0]
    assert (asked["id"], asked["state"], asked["failure"]) == (variant, "queued", None)


def test_presence_of_an_earlier_boot_is_not_believed(api: TestClient, database: Database) -> None:
    register(database, "a")

    def say(*, online: bool, boot: str) -> bool:
        with database.write() as session:
            reports.record_presence(session, [("a", Presence(online=online, boot_id=boot))], utc_now())
        return bool(api.get("/devices/a").json()["online"])

    assert say(online=False, boot="the one before")
    assert not say(online=False, boot="b")
    assert api.get("/devices", params={"online": False}).json()["items"][0]["id"] == "a"
    with database.write() as session:
        said = [(name, Presence(online=True, boot_id="b")) for name in ("nobody", "a")]
        assert reports.record_presence(session, said, utc_now()) == {"a"}


def test_what_was_done_is_written_down_and_what_failed_is_not(api: TestClient, database: Database) -> None:
    register(database, "a")
    api.post("/profiles", json=profile("p"))
    api.post("/profiles", json=profile("p", threads=2))
    api.patch("/devices/a", json={"tags": {"line": "3"}})
    version(api, "m", "1", b"m")
    api.post("/variants", json={"version": "m@1", "profiles": ["p"]})
    api.post("/variants", json={"version": "m@1", "profiles": ["p", "nowhere"]})
    api.delete("/models/m/versions/1")
    api.delete("/profiles/p")
    events = [one for one in api.get("/audit-events").json()["items"] if one["actor"] != "server"]
    assert [(one["actor"], one["action"]) for one in reversed(events)] == [
        ("a", "device.register"),
        ("admin", "profile.create"),
        ("admin", "device.update"),
        ("admin", "upload.create"),
        ("admin", "version.create"),
        ("admin", "variant.build"),
        ("admin", "version.delete"),
        ("admin", "profile.delete"),
    ]
    assert events[0]["subject"] == "profile/p"
    assert next(one for one in events if one["action"] == "device.update")["detail"] == {"tags": {"line": "3"}}
