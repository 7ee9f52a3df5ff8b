"""`shoal login --oidc` against a real server and a provider that speaks real HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleet_server.cli import credentials, oidc
from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import LocalFleet
from tests.openid_provider import CLIENT_ID, OpenIdProvider

Shoal = Callable[..., Result]


@pytest.fixture(scope="module")
def provider() -> Iterator[OpenIdProvider]:
    with OpenIdProvider() as provider:
        yield provider


@pytest.fixture(scope="module")
def fleet(provider: OpenIdProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(
            SHOAL_ADMIN_TOKEN="correct-horse",
            SHOAL_OIDC_ISSUER=provider.issuer,
            SHOAL_OIDC_CLIENT_ID=CLIENT_ID,
            SHOAL_OIDC_ROLES='{"ml": {"default": "releaser"}}',
        )
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def shoal(fleet: LocalFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shoal:
    """The command line of somebody who is not logged in."""
    for name, value in {"SHOAL_URL": fleet.url, "XDG_CONFIG_HOME": str(tmp_path), "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SHOAL_TOKEN", raising=False)

    def run(*arguments: str) -> Result:
        done = CliRunner().invoke(app, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run


@pytest.fixture(autouse=True)
def slept(provider: OpenIdProvider, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the command line would have waited."""
    provider.documents.clear()
    provider.answers.clear()
    seconds: list[float] = []
    monkeypatch.setattr(oidc.time, "sleep", seconds.append)
    return seconds


def kept(tmp_path: Path) -> Any:
    return next(iter(json.loads((tmp_path / "shoal" / "credentials.json").read_text()).values()))


def test_one_logs_in_works_on_and_logs_out(
    shoal: Shoal, provider: OpenIdProvider, slept: list[float], tmp_path: Path
) -> None:
    short = provider.claims("ml", exp=int(time.time()) + 10)
    provider.answers += ["authorization_pending", "slow_down", "authorization_pending", short]
    done = shoal("login", "--oidc")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert f"{provider.issuer}/activate" in said
    assert "WDJB-MJHT" in said
    assert "releaser in default" in said
    assert slept == [1.0, 1.0, 6.0, 6.0]
    assert provider.scope == "openid profile groups offline_access"
    file = tmp_path / "shoal" / "credentials.json"
    assert file.stat().st_mode & 0o777 == 0o600
    first = kept(tmp_path)

    # It ends so soon that the next command renews it: once, though several ask at the same time.
    asked = provider.asked["/token"]
    url = next(iter(json.loads(file.read_text())))
    with ThreadPoolExecutor(4) as pool:
        tokens = set(pool.map(oidc.current_token, [url] * 4))
    assert (len(tokens), provider.asked["/token"]) == (1, asked + 1)
    assert json.loads(shoal("whoami", "-o", "json").stdout)["name"].startswith("oidc/ada#")
    assert provider.asked["/token"] == asked + 1
    second = kept(tmp_path)
    assert second["refresh_token"] != first["refresh_token"]
    assert second["expires_at"] > first["expires_at"]

    assert shoal("logout").exit_code == 0
    assert provider.revoked == [second["refresh_token"]]
    assert shoal("whoami").exit_code == 3


def test_a_login_that_is_not_renewed_has_ended(shoal: Shoal, provider: OpenIdProvider, tmp_path: Path) -> None:
    provider.answers.append(provider.claims("ml", exp=int(time.time()) + 10))
    assert shoal("login", "--oidc").exit_code == 0
    provider.refresh_tokens.clear()
    ended = shoal("whoami")
    assert ended.exit_code == 3
    assert "shoal login --oidc" in " ".join(ended.stderr.split())
    assert shoal("--token", "correct-horse", "whoami").exit_code == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("access_denied", "refused there"),
        ("expired_token", "in time"),
        ("invalid_client", "invalid_client"),
    ],
)
def test_a_login_that_comes_to_nothing(
    shoal: Shoal, provider: OpenIdProvider, tmp_path: Path, answer: str, said: str
) -> None:
    provider.answers.append(answer)
    done = shoal("login", "--oidc")
    assert done.exit_code == 3
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "shoal" / "credentials.json").exists()


def test_who_has_no_role_is_not_logged_in(shoal: Shoal, provider: OpenIdProvider, tmp_path: Path) -> None:
    provider.answers.append(provider.claims("strangers"))
    done = shoal("login", "--oidc")
    assert done.exit_code == 3
    assert "SHOAL_OIDC_ROLES" in done.stderr
    assert not (tmp_path / "shoal" / "credentials.json").exists()


@pytest.mark.parametrize(
    ("path", "document", "said"),
    [
        ("/.well-known/openid-configuration", {"jwks_uri": "https://a.example/"}, "device authorization"),
        ("/device", {"user_code": "A"}, "RFC 8628"),
        ("/device", {"verification_uri": "http://evil.example/"}, "RFC 8628"),
        ("/token", {"access_token": "opaque"}, "no ID token"),
    ],
)
def test_a_provider_that_can_not(
    shoal: Shoal, provider: OpenIdProvider, path: str, document: dict[str, str], said: str
) -> None:
    provider.documents[path] = {"issuer": provider.issuer, **document}
    done = shoal("login", "--oidc")
    assert done.exit_code == 3
    assert said in " ".join(done.stderr.split())


def test_a_file_that_was_damaged_is_nobody(shoal: Shoal, fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "shoal").mkdir()
    for text in ("[]", "{", json.dumps({fleet.url: {"colour": "red"}}), json.dumps({fleet.url: 7})):
        (tmp_path / "shoal" / "credentials.json").write_text(text)
        assert credentials.load(fleet.url) is None
        assert shoal("whoami").exit_code == 3
