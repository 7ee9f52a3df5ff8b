"""Tokens of an OpenID provider at the API: who they make one, and what is tried with those that are none."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from starlette.testclient import TestClient

from fleet_server.access.oidc import OidcVerifier
from fleet_server.access.oidc_keys import FRESH_S, KEPT_S, PAUSE_S, WAITING, ProviderKeys
from fleet_server.app import create_app, running
from fleet_server.errors import UnavailableError
from fleet_server.settings import Settings
from tests.fleet import wait_until
from tests.openid_provider import CLIENT_ID, OpenIdProvider, new_key

ADMIN = "the-admin-of-tests"
ROLES = {
    "readers": {"default": "viewer"},
    "ml": {"default": "operator", "plant7": "releaser"},
    "ops": {"*": "admin"},
    "auditors": {"*": "viewer"},
}
KEYS, DISCOVERY = "/keys", "/.well-known/openid-configuration"


@pytest.fixture(scope="module")
def provider() -> Iterator[OpenIdProvider]:
    with OpenIdProvider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def _as_new(provider: OpenIdProvider) -> None:
    provider.keys, provider.down = [new_key("first")], False
    provider.documents.clear()
    provider.asked.clear()


@pytest.fixture(scope="module")
def application(provider: OpenIdProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"), broker_url="mqtt://127.0.0.1:1", conversion_workers=0,
        admin_token=ADMIN, oidc_issuer=provider.issuer, oidc_client_id=CLIENT_ID, oidc_roles=ROLES,
        anonymous_burst=1_000_000,
    )  # fmt: skip
    app = create_app(settings)
    with running(app):
        assert client(app, ADMIN).post("/fleets", json={"id": "plant7"}).status_code == 201
        yield app


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(application: FastAPI) -> Clock:
    """Of a verifier that knows no keys yet."""
    clock = Clock()
    application.state.oidc = OidcVerifier.of(application.state.settings, clock)
    return clock


def client(application: FastAPI, token: str | None, **headers: str) -> TestClient:
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return TestClient(application, base_url="http://localhost/api/v1", headers=headers, raise_server_exceptions=False)


def refused(application: FastAPI, token: str, status: int = 401, code: str = "not_authenticated") -> str:
    answer = client(application, token).get("/me")
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    detail: str = answer.json()["detail"]
    return detail


def accepted(application: FastAPI, token: str, **headers: str) -> dict[str, Any]:
    answer = client(application, token, **headers).get("/me")
    assert answer.status_code == 200, answer.text
    me: dict[str, Any] = answer.json()
    return me


def encoded(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def test_a_token_of_the_provider_makes_one_somebody(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    me = accepted(application, provider.token("readers"))
    assert (me["fleet"], me["role"], me["server_wide"]) == ("default", "viewer", False)
    assert me["name"].startswith("oidc/ada#")
    assert accepted(application, provider.token("readers", "ml", "unknown"))["role"] == "operator", "the highest"
    assert accepted(application, provider.token("readers", aud=["other", CLIENT_ID]))["role"] == "viewer"
    assert accepted(application, provider.token(groups="readers"))["role"] == "viewer"
    other = accepted(application, provider.token("readers", sub="another"))["name"]
    assert other != me["name"], "a name that people choose themselves tells nobody apart"
    renamed = provider.token("readers", preferred_username="admin\x1b[2J\n")
    assert accepted(application, renamed)["name"] == f"oidc/admin[2J#{me['name'].rpartition('#')[2]}"
    assert provider.asked == {DISCOVERY: 1, KEYS: 1}
    assert client(application, None).get("/login").json() == {
        "oidc": {"issuer": provider.issuer, "client_id": CLIENT_ID}
    }


def test_roles_hold_in_their_fleet_only(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    ml, readers, auditors = (provider.token(group) for group in ("ml", "readers", "auditors"))
    assert accepted(application, ml, **{"X-Shoal-Fleet": "plant7"})["role"] == "releaser"
    for fleet in ("plant7", "nowhere", "*"):
        answer = client(application, readers, **{"X-Shoal-Fleet": fleet}).get("/me")
        assert (answer.status_code, answer.json()["code"]) == (403, "fleet_not_yours")
    profile = {"name": "p", "runtime": "onnx"}
    assert client(application, readers).post("/profiles", json=profile).json()["code"] == "role_needed"
    assert accepted(application, auditors, **{"X-Shoal-Fleet": "plant7"})["role"] == "viewer"
    assert accepted(application, auditors)["server_wide"] is False
    ops = client(application, provider.token("ops", "auditors"), **{"X-Shoal-Fleet": "plant7"})
    assert ops.post("/profiles", json=profile).status_code == 201
    event = next(one for one in ops.get("/audit-events").json()["items"] if one["actor"] != "server")
    assert (event["actor"], event["action"]) == (ops.get("/me").json()["name"], "profile.create")
    assert accepted(application, provider.token("ops"))["server_wide"] is True


@pytest.mark.parametrize("groups", [(), ("strangers",)])
def test_who_has_no_role_is_told_so(
    application: FastAPI, provider: OpenIdProvider, clock: Clock, groups: tuple[str, ...]
) -> None:
    assert "SHOAL_OIDC_ROLES" in refused(application, provider.token(*groups), 403, "no_role")


@pytest.mark.parametrize("value", [{"ml": {}}, 7, [["ml"], None, 3], True])
def test_a_claim_of_another_shape_gives_nothing(
    application: FastAPI, provider: OpenIdProvider, clock: Clock, value: object
) -> None:
    refused(application, provider.token(groups=value), 403, "no_role")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"iss": "https://evil.example"}, "'iss'"),
        ({"iss": None}, "'iss'"),
        ({"aud": "another-client"}, "'aud'"),
        ({"aud": ["a", "b"]}, "'aud'"),
        ({"aud": None}, "'aud'"),
        ({"aud": {CLIENT_ID: 1}}, "'aud'"),
        ({"sub": None}, "'sub'"),
        ({"sub": ""}, "'sub'"),
        ({"sub": "s" * 256}, "subject"),
        ({"exp": None}, "'exp'"),
        ({"exp": "never"}, "'exp'"),
        ({"exp": int(time.time()) - 60}, "expired"),
        ({"nbf": int(time.time()) + 3600}, "'nbf'"),
        ({"iat": int(time.time()) + 3600}, "'iat'"),
        ({"iat": None}, "'iat'"),
        ({"iat": int(time.time()) - 13 * 3600}, "SHOAL_SESSION_HOURS"),
    ],
)
def test_claims_that_do_not_fit(
    application: FastAPI, provider: OpenIdProvider, clock: Clock, changed: dict[str, Any], why: str
) -> None:
    assert why in refused(application, provider.token("ops", **changed))


def test_clocks_may_differ_a_little(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    now = int(time.time())
    accepted(application, provider.token("ops", nbf=now + 20, iat=now + 20))
    accepted(application, provider.token("ops", exp=now - 10))


def test_forged_signatures(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    genuine, claims = provider.token("ops"), provider.claims("ops")
    accepted(application, genuine)
    header, body, signature = genuine.split(".")
    public = provider.keys[0]
    for algorithm in ("none", "None", "nOnE", "", None, ["ES256"], 7):
        for tail in ("", signature):
            refused(application, f"{encoded({'alg': algorithm, 'kid': 'first'})}.{encoded(claims)}.{tail}")
    for secret in (public.as_pem(private=False), json.dumps(public.as_dict(private=False)).encode()):
        signed = f"{encoded({'alg': 'HS256', 'kid': 'first'})}.{encoded(claims)}"
        code = hmac.digest(secret, signed.encode(), "sha256")  # by hand: the library refuses such a secret
        refused(application, f"{signed}.{base64.urlsafe_b64encode(code).rstrip(b'=').decode()}")
    refused(application, provider.sign(claims, key=new_key("first")))
    refused(application, f"{header}.{encoded(claims | {'sub': 'somebody else'})}.{signature}")
    refused(application, f"{header}.{body}.")
    refused(application, provider.sign(claims, jwk=new_key("first").as_dict(private=False), key=new_key("first")))
    refused(application, provider.sign(claims, typ="logout+jwt"))
    with_crit = {"alg": "ES256", "kid": "first", "crit": ["http://x"], "http://x": 1}
    refused(application, f"{encoded(with_crit)}.{body}.{signature}")
    other = RSAKey.generate_key(2048, {"kid": "first"})
    refused(application, provider.sign(claims, key=other, alg="RS256"))


@pytest.mark.parametrize(
    "text", ["..", "a.b.c", "e30.e30.e30", "W10.W10.", f"{'W1' * 9000}.x.y", f"{'e30' * 50}..", "\xff.\xff.\xff"]
)
def test_what_is_no_token_at_all(application: FastAPI, provider: OpenIdProvider, clock: Clock, text: str) -> None:
    answer = client(application, None).get("/me", headers={"Authorization": b"Bearer " + text.encode("latin-1")})
    assert answer.status_code == 401
    assert provider.asked.total() == 0


def test_deep_json_is_refused(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    deep = base64.urlsafe_b64encode(b'{"alg":' + b"[" * 2900).rstrip(b"=").decode()
    refused(application, f"{deep}.e30.x")


@pytest.mark.filterwarnings("ignore:Key size should be")
def test_keys_of_other_kinds_are_passed_over(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    secret = OctKey.import_key({"kty": "oct", "k": base64.urlsafe_b64encode(b"s" * 33).decode(), "kid": "shared"})
    weak = RSAKey.generate_key(1024, {"kid": "weak"})
    strong = RSAKey.generate_key(2048, {"kid": "strong"})
    published = [one.as_dict(private=False) for one in (weak, strong, provider.keys[0])]
    others = [
        secret.as_dict(private=True),
        {"kty": "new"},
        7,
        {},
        {"kty": "EC", "crv": "P-256", "x": "!", "kid": "bad"},
    ]
    provider.documents[KEYS] = {"keys": [*others, *published]}
    accepted(application, provider.token("ops"))
    accepted(application, provider.sign(provider.claims("ops"), key=strong, alg="PS256"))
    refused(application, provider.sign(provider.claims("ops"), key=weak, alg="RS256"))
    refused(application, jwt.encode({"alg": "HS256", "kid": "shared"}, provider.claims("ops"), secret, ["HS256"]))


def test_unknown_keys_are_asked_for_now_and_then_only(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    accepted(application, provider.token("ops"))
    claims = provider.claims("ops")
    forger = new_key("forged")
    for number in range(25):
        refused(application, provider.sign(claims, key=forger, kid=f"unknown-{number}"))
    assert provider.asked[KEYS] == 1
    clock.now += PAUSE_S
    for number in range(25):
        refused(application, provider.sign(claims, key=forger, kid=f"unknown-{number}"))
    assert provider.asked == {DISCOVERY: 2, KEYS: 2}
    accepted(application, provider.token("ops"))


def test_a_provider_that_hangs_holds_up_few(provider: OpenIdProvider) -> None:
    clock = Clock()
    keys = ProviderKeys(provider.issuer, clock)
    keys.for_token("first")
    clock.now += PAUSE_S
    provider.answering.clear()
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(keys.for_token, f"unknown-{number}") for number in range(20)]
        wait_until("those sent away", lambda: sum(one.done() for one in asked) == 20 - WAITING, 8)
        sent_away = [one.exception() for one in asked if one.done()]
        known = keys.for_token("first")
        provider.answering.set()
    assert {type(one) for one in sent_away} == {UnavailableError}
    assert {key.kid for key in known} == {"first"}
    assert provider.asked[KEYS] == 2


def test_a_token_without_a_key_id_serves_where_there_is_one_key(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    bare = jwt.encode({"alg": "ES256"}, provider.claims("ops"), provider.keys[0], ["ES256"])
    accepted(application, bare)
    provider.keys.append(new_key("second"))
    clock.now += FRESH_S
    refused(application, bare)


def test_keys_are_rotated(application: FastAPI, provider: OpenIdProvider, clock: Clock) -> None:
    before = provider.token("ops")
    accepted(application, before)
    provider.keys = [new_key("second")]
    clock.now += PAUSE_S
    accepted(application, provider.token("ops"))
    refused(application, before)


def test_a_key_that_was_taken_away_counts_no_longer(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    stolen = provider.token("ops")
    accepted(application, stolen)
    provider.keys = [new_key("second")]
    clock.now += FRESH_S
    refused(application, stolen)


def test_what_is_known_holds_while_the_provider_is_down(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    token = provider.token("ops")
    provider.down = True
    for _ in range(20):
        assert "OpenID provider does not answer" in refused(application, token, 503, "oidc_provider")
    assert provider.asked == {DISCOVERY: 1}
    provider.down = False
    clock.now += PAUSE_S
    accepted(application, token)
    provider.down = True
    clock.now += FRESH_S
    accepted(application, token)
    refused(application, provider.sign(provider.claims("ops"), key=new_key("second")), 503, "oidc_provider")
    clock.now += KEPT_S
    refused(application, token, 503, "oidc_provider")
    assert client(application, ADMIN).get("/me").status_code == 200


@pytest.mark.parametrize(
    ("path", "document"),
    [
        (DISCOVERY, {"issuer": "https://evil.example", "jwks_uri": "https://evil.example/keys"}),
        (DISCOVERY, []),
        (KEYS, {"keys": []}),
        (KEYS, {"keys": "all"}),
        (KEYS, {"keys": "x" * (1 << 20)}),
    ],
)
def test_a_provider_that_says_nonsense(
    application: FastAPI, provider: OpenIdProvider, clock: Clock, path: str, document: Any
) -> None:
    provider.documents[path] = document
    refused(application, provider.token("ops"), 503, "oidc_provider")


def test_keys_are_not_asked_for_without_tls_beyond_this_machine(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    provider.documents[DISCOVERY] = {"issuer": provider.issuer, "jwks_uri": "http://keys.example/"}
    refused(application, provider.token("ops"), 503, "oidc_provider")


def test_a_token_of_the_provider_can_not_log_out_here(
    application: FastAPI, provider: OpenIdProvider, clock: Clock
) -> None:
    answer = client(application, provider.token("ops")).post("/logout")
    assert (answer.status_code, answer.json()["code"]) == (409, "oidc_token")


def test_without_a_provider_its_tokens_are_nothing(provider: OpenIdProvider, tmp_path: Path) -> None:
    app = create_app(
        Settings(state_dir=tmp_path, broker_url="mqtt://127.0.0.1:1", conversion_workers=0, admin_token=ADMIN)
    )
    with running(app):
        refused(app, provider.token("ops"))
        assert client(app, None).get("/login").json() == {"oidc": None}
    assert provider.asked.total() == 0
