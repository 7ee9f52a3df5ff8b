"""What an OpenID provider says of itself (OpenID Connect Discovery 1.0), asked for with bounds.

The server and the command line both need it. Nothing is sent to, or believed from, an address without TLS beyond this
machine, and redirects are not followed: the addresses in use are those that the settings and the provider name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from fleet_server.addresses import is_loopback

TIMEOUT_S = 5.0
MAX_BYTES = 1 << 20
DISCOVERY = "/.well-known/openid-configuration"


class ProviderError(Exception):
    """An OpenID provider does not answer, or not as it should; the text is for people."""


@dataclass(frozen=True)
class Provider:
    """Addresses of a provider. Those that it does not name are None.

    Attributes:
        issuer: what its tokens carry as `iss`.
        jwks_uri: of its public keys (RFC 7517).
        device_authorization_endpoint: RFC 8628.
        token_endpoint: RFC 6749.
        revocation_endpoint: RFC 7009.
        scopes: that it says it knows.
    """

    issuer: str
    jwks_uri: str
    device_authorization_endpoint: str | None
    token_endpoint: str | None
    revocation_endpoint: str | None
    scopes: frozenset[str]


def check_url(url: str) -> str:
    """An address that nobody on the way can read or change.

    Raises:
        ValueError: when it is not https://, nor http:// on this machine.
    """
    try:
        parts = urlsplit(url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        usable = safe and parts.hostname and parts.username is None and not parts.fragment and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it is not https://host/… (http:// on this machine only)")
    return url


def client() -> httpx.Client:
    """An HTTP client for a provider. `SSL_CERT_FILE` names certificates to check it by, instead of the usual ones."""
    return httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, headers={"Accept": "application/json"})


def discover(http: httpx.Client, issuer: str) -> Provider:
    """What a provider says of itself.

    Raises:
        ProviderError: when it does not answer, speaks for another issuer, or names an address that is not safe.
    """
    status, said = ask(http, issuer.rstrip("/") + DISCOVERY)
    if status != httpx.codes.OK:
        raise ProviderError(f"the OpenID provider {issuer} answers {status} to {DISCOVERY}")
    if said.get("issuer") != issuer:
        raise ProviderError(f"the OpenID provider at {issuer} says it is {str(said.get('issuer'))[:200]!r}")
    jwks_uri = _address(said, "jwks_uri")
    if jwks_uri is None:
        raise ProviderError(f"the OpenID provider {issuer} names no jwks_uri")
    scopes = said.get("scopes_supported")
    return Provider(
        issuer,
        jwks_uri,
        _address(said, "device_authorization_endpoint"),
        _address(said, "token_endpoint"),
        _address(said, "revocation_endpoint"),
        frozenset(one for one in scopes if isinstance(one, str)) if isinstance(scopes, list) else frozenset(),
    )


def ask(http: httpx.Client, url: str, form: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of an answer; a form is posted.

    Raises:
        ProviderError: when no answer comes in time, or it is too large, or no JSON object.
    """
    deadline, body = time.monotonic() + 2 * TIMEOUT_S, bytearray()
    try:
        with http.stream("GET" if form is None else "POST", url, data=form) as answer:
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > MAX_BYTES or time.monotonic() > deadline:
                    raise ProviderError(f"{url} answers too much, or too slowly")
            status = answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ProviderError(f"{url} does not answer ({error})") from None
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ProviderError(f"{url} answers {status} with no JSON object")
    return status, said


def _address(said: dict[str, Any], name: str) -> str | None:
    value = said.get(name)
    if value is None:
        return None
    try:
        return check_url(str(value))
    except ValueError as error:
        raise ProviderError(f"{name} of the OpenID provider: {error}") from None
