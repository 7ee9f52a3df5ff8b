"""Webhooks against a real receiver on loopback, on SQLite and PostgreSQL: nothing is lost, and all of it is signed."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient

from fleet_server import events
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import Lease, Rollout, Webhook, WebhookDelivery
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.webhooks import schedule, sending
from tests import rest, sqlite_file
from tests.databases import make_empty, short_on_sqlite
from tests.fleet import LocalFleet, free_port, wait_until
from tests.integration.test_api import refused

Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (204, {}, b"")


class Receiver:
    """Takes what comes, and answers as the test wants."""

    def __init__(self, port: int = 0) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Callable[[str, dict[str, Any]], Answer] = lambda _path, _event: OK
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append((self.path, headers, body))
                status, said, content = receiver.answer(self.path, json.loads(body))
                self.send_response(status)
                for name, value in said.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def events(self, path: str = "/") -> list[dict[str, Any]]:
        return [json.loads(body) for where, _, body in list(self.got) if where == path]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    receiver = Receiver(port)
    try:
        yield receiver
    finally:
        receiver.stop()


def verified(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """Standard Webhooks as a receiver would do it, without any code of the server's."""
    key = base64.b64decode(secret.split("_", 1)[1])
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    age = abs(utc_now().timestamp() - int(headers["webhook-timestamp"]))
    return age < 300 and any(one == f"v1,{wanted}" for one in headers["webhook-signature"].split(" "))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FastAPI]]:
    """Two servers on one database: either may send."""
    folder = tmp_path_factory.mktemp("state")
    sqlite_file.put(folder)
    sqlite = f"sqlite:///{folder / 'shoal.db'}"
    url = sqlite if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    options = {"webhook_allow_private": True, "engine_tick_s": 3600}
    with rest.serving(folder / "a", url, **options) as first, rest.serving(folder / "a", url, **options) as second:
        yield [first, second]


@pytest.fixture
def database(servers: list[FastAPI], monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(schedule, "FIRST_S", 0.02)
    monkeypatch.setattr(schedule, "FACTOR", 1.5)
    database: Database = servers[0].state.database
    with database.write() as session:
        leases = session.execute(select(Lease.name, Lease.owner, Lease.until)).all()
        make_empty(session)
        session.add_all(  # who holds one knows it, and does not ask for it each time
            Lease(name=name, owner=owner, until=until, fleet_id=DEFAULT_FLEET) for name, owner, until in leases
        )
    return database


@pytest.fixture
def names(database: Database) -> dict[str, str]:
    return rest.fill(database, 3)


@pytest.fixture
def api(servers: list[FastAPI], names: dict[str, str]) -> TestClient:
    return rest.caller(servers[0])


@pytest.fixture
def receiver(api: TestClient) -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def hook(api: TestClient, url: str, *types: str, **fields: Any) -> dict[str, Any]:
    answer = api.post("/webhooks", json={"url": url, "types": types or ["*"], **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def deliveries(api: TestClient, **parameters: str) -> list[dict[str, Any]]:
    """Of webhooks of the test, oldest first."""
    rows = api.get("/webhook-deliveries", params={"limit": 500, "sort": "created_at", **parameters}).json()["items"]
    return [one for one in rows if not one["type"].startswith("shoal.test.")]


def settled(api: TestClient, **parameters: str) -> list[dict[str, Any]]:
    def found() -> list[dict[str, Any]] | None:
        rows = deliveries(api, **parameters)
        return rows if rows and all(one["state"] != "pending" for one in rows) else None

    return wait_until("deliveries to be settled", found)


@short_on_sqlite("servers")
def test_what_becomes_of_a_rollout_is_told_in_order_and_signed(
    api: TestClient, receiver: Receiver, names: dict[str, str]
) -> None:
    made = hook(api, f"{receiver.url}/", "shoal.rollout.*")
    path = f"/rollouts/{names['rollout_id']}"
    with rest_of(api).write() as session:
        session.get_one(Rollout, names["rollout_id"]).state = "paused"
    for end in ("resume", "pause", "resume", "abort"):
        assert api.post(f"{path}/{end}", json={} if end == "abort" else None).status_code == 200
    refused(api.post(f"{path}/pause"), 409, "bad_transition")
    rows = settled(api)
    assert [one["state"] for one in rows] == ["delivered"] * 4
    told = receiver.events()
    kinds = [event["type"] for event in told]
    assert kinds == [f"shoal.rollout.{one}" for one in ("resumed", "paused", "resumed", "stopped")]
    assert [event["data"]["state"] for event in told] == ["running", "paused", "running", "stopped"]
    for (_, headers, body), event, row in zip(receiver.got, told, rows, strict=True):
        assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
        assert headers["webhook-id"] == event["id"] == row["event_id"]
        assert verified(made["secret"], headers, body)
        assert not verified("whsec_" + base64.b64encode(b"x" * 32).decode(), headers, body)
        assert not verified(made["secret"], headers, body + b" ")
        assert (event["specversion"], event["source"]) == ("1.0", f"/api/v1/fleets/{DEFAULT_FLEET}")
        assert event["subject"] == f"rollout/{names['rollout_id']}"
        assert event["data"]["name"] == "rollout-0"
    shown = api.get(f"/webhook-deliveries/{rows[0]['id']}").json()
    assert shown["event"] == told[0]
    assert (shown["last_status"], shown["attempts"]) == (204, 1)


@short_on_sqlite("servers")
def test_only_what_was_subscribed_to_is_told_and_only_to_who_is_active(
    api: TestClient, receiver: Receiver, names: dict[str, str]
) -> None:
    hook(api, f"{receiver.url}/all")
    hook(api, f"{receiver.url}/stops", "shoal.deployment.*", "shoal.rollout.stop*")
    hook(api, f"{receiver.url}/alerts", "shoal.alert.*")
    hook(api, f"{receiver.url}/asleep", active=False)
    with rest_of(api).write() as session:
        session.get_one(Rollout, names["rollout_id"]).state = "running"
    for end in ("pause", "abort"):
        assert api.post(f"/rollouts/{names['rollout_id']}/{end}", json={} if end == "abort" else None).is_success
    settled(api)
    by_path = defaultdict(list)
    for path, _, body in receiver.got:
        by_path[path].append(json.loads(body)["type"])
    assert by_path == {"/all": ["shoal.rollout.paused", "shoal.rollout.stopped"], "/stops": ["shoal.rollout.stopped"]}


def rest_of(api: TestClient) -> Database:
    database: Database = api.app.state.database  # type: ignore[attr-defined]
    return database


def test_what_a_receiver_does_not_take_is_sent_again_and_nothing_of_its_subject_before(
    api: TestClient, receiver: Receiver
) -> None:
    """The first two tries of every event fail: all the same each subject's events arrive in their order."""
    webhook = hook(api, f"{receiver.url}/")
    tries: dict[str, int] = defaultdict(int)

    def twice_no(_path: str, event: dict[str, Any]) -> Answer:
        tries[event["id"]] += 1
        return OK if tries[event["id"]] > 2 else (500, {}, b"not today")

    receiver.answer = twice_no
    with rest_of(api).write() as session:
        row = session.get_one(Webhook, webhook["id"])
        for number in range(9):
            session.add(letter(row, f"thing/{number % 3}", number))
    rows = settled(api)
    assert [one["attempts"] for one in rows] == [3] * 9
    assert {one["state"] for one in rows} == {"delivered"}
    for subject in range(3):
        order = [one["data"]["number"] for one in receiver.events() if one["subject"] == f"thing/{subject}"]
        assert order == [number for number in range(subject, 9, 3) for _ in range(3)]


def letter(webhook: Webhook, subject: str, number: int) -> WebhookDelivery:
    event_id, body = events.cloud_event(webhook.fleet_id, "shoal.thing", subject, {"number": number})
    return events.deliver(webhook, event_id, "shoal.thing", subject, body)


@short_on_sqlite("servers")
def test_dead_letters_are_listed_and_sent_again(api: TestClient, receiver: Receiver) -> None:
    webhook = hook(api, f"{receiver.url}/")
    receiver.answer = lambda _path, _event: (500, {}, b"broken" + b"x" * 100_000)
    path = f"/webhooks/{webhook['id']}/test"
    with rest_of(api).write() as session:
        old = letter(session.get_one(Webhook, webhook["id"]), "thing/1", 1)
        old.due_since = utc_now() - dt.timedelta(days=2)
        session.add(old)
    (dead,) = settled(api, state="dead")
    assert (dead["id"], dead["attempts"], dead["last_status"]) == (old.id, 1, 500)
    assert "broken" in dead["last_detail"]
    assert len(dead["last_detail"]) < 500
    receiver.answer = lambda _path, _event: OK
    assert api.post(f"/webhook-deliveries/{old.id}/redeliver").status_code == 202
    (again,) = settled(api)
    assert (again["id"], again["state"], again["attempts"]) == (old.id, "delivered", 1)
    assert len({headers["webhook-id"] for _, headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 2
    assert api.get("/webhook-deliveries", params={"state": "dead", "webhook": webhook["id"]}).json()["items"] == []
    assert api.post(f"/webhook-deliveries/{old.id}/redeliver").status_code == 202, "what was delivered may be, too"
    settled(api)
    assert api.post(path).status_code == 202


@short_on_sqlite("servers")
def test_what_is_pending_is_not_redelivered(api: TestClient, receiver: Receiver) -> None:
    receiver.answer = lambda _path, _event: (503, {"Retry-After": "3600"}, b"")
    webhook = hook(api, f"{receiver.url}/")
    delivery = api.post(f"/webhooks/{webhook['id']}/test").json()

    def tried() -> Any:
        found = api.get(f"/webhook-deliveries/{delivery['id']}").json()
        return found if found["attempts"] else None

    found = wait_until("a try", tried)
    assert found["state"] == "pending"
    wait = dt.datetime.fromisoformat(found["next_at"]) - utc_now()
    assert wait > dt.timedelta(minutes=50), "the receiver asked for an hour"
    refused(api.post(f"/webhook-deliveries/{delivery['id']}/redeliver"), 409, "not_dead")
    assert len(receiver.got) == 1


@short_on_sqlite("servers")
def test_who_is_gone_is_told_no_more(api: TestClient, receiver: Receiver) -> None:
    receiver.answer = lambda _path, _event: (410, {}, b"")
    webhook = hook(api, f"{receiver.url}/")
    with rest_of(api).write() as session:
        row = session.get_one(Webhook, webhook["id"])
        session.add_all([letter(row, "thing/1", number) for number in range(3)])
    rows = settled(api)
    assert [one["state"] for one in rows] == ["dead"] * 3
    assert len(receiver.got) == 1
    shown = api.get(f"/webhooks/{webhook['id']}").json()
    assert not shown["active"]
    assert "410" in shown["stopped_because"]
    refused(api.post(f"/webhooks/{webhook['id']}/test"), 409, "webhook_inactive")
    refused(api.post(f"/webhook-deliveries/{rows[0]['id']}/redeliver"), 409, "webhook_inactive")
    receiver.answer = lambda _path, _event: OK
    assert api.patch(f"/webhooks/{webhook['id']}", json={"active": True}).json()["stopped_because"] == ""
    assert api.post(f"/webhook-deliveries/{rows[0]['id']}/redeliver").status_code == 202


@short_on_sqlite("servers")
def test_both_secrets_sign_while_they_are_changed(api: TestClient, receiver: Receiver) -> None:
    given = "whsec_" + base64.b64encode(bytes(range(24))).decode()
    webhook = hook(api, f"{receiver.url}/", secret=given)
    assert webhook["secret"] == given
    path = f"/webhooks/{webhook['id']}"
    assert "secret" not in api.get(path).json()
    assert given not in api.get("/webhooks").text
    second = api.post(f"{path}/rotate-secret", json={}).json()["secret"]
    api.post(f"{path}/test")
    settled(api)
    third = api.post(f"{path}/rotate-secret", json={"overlap_hours": 0}).json()["secret"]
    api.post(f"{path}/test")
    settled(api)
    (first_headers, first_body), (last_headers, last_body) = [(headers, body) for _, headers, body in receiver.got]
    assert [verified(one, first_headers, first_body) for one in (given, second, third)] == [True, True, False]
    assert [verified(one, last_headers, last_body) for one in (given, second, third)] == [False, False, True]
    refused(api.post("/webhooks", json={"url": receiver.url, "types": ["*"], "secret": "short"}), 422, "invalid")


@short_on_sqlite("servers")
def test_one_that_never_answers_holds_up_no_other(api: TestClient, receiver: Receiver) -> None:
    """While every thread it may have waits for it, all events of the other arrive."""
    go_on, waiting = threading.Event(), threading.Event()

    def stuck(path: str, _event: dict[str, Any]) -> Answer:
        if path == "/slow":
            waiting.set()
            assert go_on.wait(60)
        return OK

    receiver.answer = stuck
    slow, quick = hook(api, f"{receiver.url}/slow"), hook(api, f"{receiver.url}/quick")
    try:
        with rest_of(api).write() as session:
            for one in (slow, quick):
                row = session.get_one(Webhook, one["id"])
                session.add_all([letter(row, f"thing/{number}", number) for number in range(10)])
        assert waiting.wait(60)
        rows = settled(api, webhook=quick["id"])
        assert len(rows) == 10
        assert all(one["state"] == "delivered" for one in rows)
        assert len(receiver.events("/slow")) <= 2
    finally:
        go_on.set()
    assert len(settled(api, webhook=slow["id"])) == 10


def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on a byte at a time, so that no single read is late."""
    monkeypatch.setattr(sending, "TIMEOUT_S", 1.0)
    done = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not done.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        outcome = sending.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", {}, b"{}", allow_private=True)
        done.set()
        thread.join()
    assert not outcome.taken
    assert "no answer within" in outcome.detail


def test_redirects_are_not_followed(api: TestClient, receiver: Receiver) -> None:
    receiver.answer = lambda _path, _event: (302, {"Location": f"{receiver.url}/elsewhere"}, b"")
    outcome = sending.post(f"{receiver.url}/x?y=1", {"A": "b"}, b"{}", allow_private=True)
    assert outcome.status == 302
    assert not outcome.taken
    assert "redirects are not followed" in outcome.detail
    assert [path for path, _, _ in receiver.got] == ["/x?y=1"]


def test_each_event_is_sent_once_by_two_servers(servers: list[FastAPI], api: TestClient, receiver: Receiver) -> None:
    webhook = hook(api, f"{receiver.url}/")
    with rest_of(api).write() as session:
        row = session.get_one(Webhook, webhook["id"])
        session.add_all([letter(row, f"thing/{number % 7}", number) for number in range(60)])
    settled(api)
    ids = [headers["webhook-id"] for _, headers, _ in receiver.got]
    assert len(ids) == len(set(ids)) == 60


def test_a_webhook_goes_with_all_that_it_was_to_be_told(api: TestClient, receiver: Receiver) -> None:
    receiver.answer = lambda _path, _event: (500, {}, b"")
    webhook = hook(api, f"{receiver.url}/")
    delivery = api.post(f"/webhooks/{webhook['id']}/test").json()
    assert api.delete(f"/webhooks/{webhook['id']}").status_code == 204
    refused(api.get(f"/webhooks/{webhook['id']}"), 404, "webhook_not_found")
    refused(api.get(f"/webhook-deliveries/{delivery['id']}"), 404, "delivery_not_found")
    assert deliveries(api) == []


def test_the_servers_own_network_is_out_of_reach(tmp_path: Path) -> None:
    with rest.serving(tmp_path, None) as application, receiving() as receiver:
        api = rest.caller(application)
        port = receiver.url.rpartition(":")[2]
        for url in (
            receiver.url,
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://169.254.169.254/latest",
            "https://u@x/",
        ):
            problem = refused(api.post("/webhooks", json={"url": url, "types": ["*"]}), 422, "bad_webhook_url")
            assert problem["problems"][0]["field"] == "url"
        webhook = hook(api, f"https://localhost:{port}/")
        delivery = api.post(f"/webhooks/{webhook['id']}/test").json()

        def tried() -> Any:
            found = api.get(f"/webhook-deliveries/{delivery['id']}").json()
            return found if found["attempts"] else None

        found = wait_until("a try", tried)
        assert (found["state"], found["last_status"]) == ("pending", None)
        assert "public internet" in found["last_detail"]
        assert receiver.got == []


def test_a_killed_server_loses_no_event(tmp_path: Path) -> None:
    """Killed between the change and its telling, with nobody there to be told; the next one tells it."""
    fleet, port = LocalFleet(tmp_path), free_port()
    try:
        fleet.start_server(SHOAL_WEBHOOK_ALLOW_PRIVATE="true")
        made = fleet.post("/webhooks", {"url": f"http://127.0.0.1:{port}/", "types": ["*"]})
        ids = [fleet.post(f"/webhooks/{made['id']}/test", status=202)["event_id"] for _ in range(3)]
        fleet.kill("server")
        with receiving(port) as receiver:
            fleet.start_server(SHOAL_WEBHOOK_ALLOW_PRIVATE="true")
            wait_until("all events", lambda: {one["id"] for one in receiver.events()} >= set(ids))
            first = list(dict.fromkeys(one["id"] for one in receiver.events()))
            assert first == ids
            assert all(verified(made["secret"], headers, body) for _, headers, body in receiver.got)
    finally:
        fleet.stop()
