"""Signatures against the specification's own example, when to try again, and which addresses are nobody's business."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import socket

import pytest

from fleet_server import events
from fleet_server.webhooks import sending, signing
from fleet_server.webhooks.schedule import LONGEST_S, Outcome, next_try, retry_after
from fleet_server.webhooks.sending import RefusedAddressError, check_url, is_public, post

NOW = dt.datetime(2026, 11, 25, 12, tzinfo=dt.UTC)
REFUSED = Outcome(500, "500")


def test_the_example_of_standard_webhooks() -> None:
    """From the reference libraries of https://github.com/standard-webhooks/standard-webhooks."""
    made = signing.headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert made == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize(
    "secret", ["", "secret", "whsec_", "whsec_AAAA", "whsec_ä", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
)
def test_a_secret_that_is_none(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_"):
        signing.key_of(secret)


def test_new_secrets_are_secrets_and_differ() -> None:
    made = {signing.new_secret() for _ in range(10)}
    assert len({signing.key_of(one) for one in made}) == 10


def test_tries_come_ever_later_until_it_is_too_old() -> None:
    end = NOW + dt.timedelta(days=1)
    delays = [(next_try(n, REFUSED, NOW, end, 0.5) or NOW) - NOW for n in range(1, 12)]
    assert delays == sorted(delays)
    assert delays[0] == dt.timedelta(seconds=5)
    assert delays[-1] == dt.timedelta(seconds=LONGEST_S)
    early, late = (next_try(3, REFUSED, NOW, end, chance) for chance in (0.0, 1.0))
    assert early is not None
    assert late is not None
    assert early < late, "they are spread"
    assert next_try(10**6, REFUSED, NOW, end, 0.5) is not None
    assert next_try(1, REFUSED, NOW, NOW + dt.timedelta(seconds=1), 0.5) is None


def test_a_receiver_may_ask_for_time_and_may_be_gone() -> None:
    end = NOW + dt.timedelta(days=1)
    asked = Outcome(503, "", retry_after_s=3600)
    assert next_try(1, asked, NOW, end, 0.5) == NOW + dt.timedelta(hours=1)
    assert next_try(1, Outcome(503, "", retry_after_s=2 * 86400), NOW, end, 0.5) is None
    assert next_try(1, Outcome(410, ""), NOW, end, 0.5) is None
    assert Outcome(204, "").taken
    assert not Outcome(302, "").taken
    assert not Outcome(None, "").taken


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("9" * 40, 365 * 86400.0),
        ("Wed, 25 Nov 2026 12:01:00 GMT", 60.0),
        ("Wed, 25 Nov 2026 11:00:00 GMT", 0.0),
        ("-5", None),
        ("soon", None),
        ("١٢", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    if "%" not in address:
        host = f"[{address}]" if ":" in address else address
        with pytest.raises(RefusedAddressError):
            check_url(f"https://{host}/", allow_private=False)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::808:808"]
)
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("", "ops.example", "ftp://ops.example/", "http://ops.example/", "https:///x", "https://u:p@ops.example/"),
        *("https://ops.example/#x", "https://ops.example/a b", "https://ops.example:0/", "https://ops.example:99999/"),
        *("https://ops.example/\r\nX: y", "https://öps.example/", "https://[::1/"),
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="it"):
        check_url(url, allow_private=False)


def test_plain_http_is_for_private_networks() -> None:
    assert check_url("http://127.0.0.1:8000/x", allow_private=True).port == 8000


def test_a_name_that_means_the_server_itself_is_refused_when_it_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it meant when the webhook was made."""
    said = post("https://localhost:9/", {}, b"", allow_private=False)
    assert said.status is None
    assert "not an address of the public internet" in said.detail
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("169.254.169.254", "10.0.0.1")]
    monkeypatch.setattr(sending.socket, "getaddrinfo", lambda *_, **__: both)
    connected: list[object] = []
    monkeypatch.setattr(sending.socket, "create_connection", lambda *given: connected.append(given))
    assert "169.254.169.254" in post("https://innocent.example/", {}, b"", allow_private=False).detail
    assert connected == []


def test_the_checked_address_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 443)) for one in ("127.0.0.1", "8.8.8.8")]
    monkeypatch.setattr(sending.socket, "getaddrinfo", lambda *_, **__: mixed)
    connected = []

    def connect(address: tuple[str, int], _timeout: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError("nobody is there")

    monkeypatch.setattr(sending.socket, "create_connection", connect)
    assert "nobody is there" in post("https://innocent.example/", {}, b"", allow_private=False).detail
    assert connected == [("8.8.8.8", 443)]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["*"], True),
        (["shoal.rollout.*"], True),
        (["shoal.rollout.paused"], True),
        (["shoal.*.paused"], True),
        (["shoal.alert.*", "shoal.rollout.p*"], True),
        (["shoal.rollout"], False),
        (["shoal.rollout.pause"], False),
        (["shoalXrollout.paused"], False),
        (["shoal.deployment.*"], False),
        ([], False),
    ],
)
def test_patterns_of_types(patterns: list[str], wanted: bool) -> None:
    assert events.wants(patterns, "shoal.rollout.paused") is wanted


def test_an_event_has_what_cloudevents_asks_for() -> None:
    event_id, body = events.cloud_event("plant7", "shoal.rollout.paused", "rollout/1", {"when": NOW, "n": 1})
    event = json.loads(body)
    assert event["id"] == event_id
    assert {key: event[key] for key in ("specversion", "source", "type", "subject", "datacontenttype")} == {
        "specversion": "1.0",
        "source": "/api/v1/fleets/plant7",
        "type": "shoal.rollout.paused",
        "subject": "rollout/1",
        "datacontenttype": "application/json",
    }
    assert dt.datetime.fromisoformat(event["time"]).tzinfo is not None
    assert event["data"] == {"when": str(NOW), "n": 1}
