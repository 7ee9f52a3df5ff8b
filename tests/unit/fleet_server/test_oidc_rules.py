"""Settings of an OpenID provider, which addresses are safe, and which roles a claim gives."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fleet_server.access.oidc import Person, roles_of
from fleet_server.openid import check_url
from fleet_server.principals import Role
from fleet_server.settings import Settings

ISSUER = {"oidc_issuer": "https://login.example/realms/a", "oidc_client_id": "shoal"}
ROLES = '{"ml": {"default": "releaser"}, "ops": {"*": "admin"}}'


def test_settings_come_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_OIDC_ISSUER", ISSUER["oidc_issuer"])
    monkeypatch.setenv("SHOAL_OIDC_CLIENT_ID", "shoal")
    monkeypatch.setenv("SHOAL_OIDC_ROLES", ROLES)
    settings = Settings()
    assert settings.oidc_roles == {"ml": {"default": "releaser"}, "ops": {"*": "admin"}}
    assert settings.oidc_claim == "groups"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"oidc_issuer": "https://login.example", "oidc_roles": ROLES}, "SHOAL_OIDC_CLIENT_ID"),
        ({"oidc_client_id": "shoal"}, "SHOAL_OIDC_ISSUER"),
        (ISSUER, "SHOAL_OIDC_ROLES"),
        ({"oidc_roles": ROLES}, "SHOAL_OIDC_ISSUER"),
        (ISSUER | {"oidc_roles": ROLES, "oidc_issuer": "http://login.example"}, "https://"),
        (ISSUER | {"oidc_roles": ROLES, "oidc_issuer": "https://login.example?a=b"}, "query"),
        (ISSUER | {"oidc_roles": "ml=releaser"}, "not JSON"),
        (ISSUER | {"oidc_roles": '{"ml": "releaser"}'}, "dictionary"),
        (ISSUER | {"oidc_roles": '{"ml": {"default": "king"}}'}, "'viewer'"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["https://a.example", "https://a.example:8443/b?c=d", "http://127.0.0.1:9", "http://[::1]/"]
)
def test_safe_addresses(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "", "a.example", "http://a.example", "http://127.0.0.1.a.example", "ftp://a.example", "file:///etc/passwd",
        "https://", "https://me@a.example", "https://a.example:0", "https://a.example:x", "https://a.example/#b",
        "https://a.example/\n", "https://a.example/ b", "https://ä.example", "http://[::1",
    ],
)  # fmt: skip
def test_unsafe_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="https://"):
        check_url(url)


def test_the_highest_role_counts() -> None:
    mapping = {"a": {"x": "viewer", "y": "operator"}, "b": {"x": "releaser"}, "c": {"*": "operator"}}
    assert roles_of(["a", "b", 7, "z"], mapping) == {"x": Role.RELEASER, "y": Role.OPERATOR}
    person = Person("", "", roles_of(["a", "c"], mapping))
    assert (person.role_in("x"), person.role_in("elsewhere")) == (Role.OPERATOR, Role.OPERATOR)
    assert Person("", "", roles_of("b", mapping)).role_in("y") is None
    assert roles_of({"a": 1}, mapping) == {}
