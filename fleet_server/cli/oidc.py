"""Login at an OpenID provider by the device authorization grant (RFC 8628): the browser may be on another machine."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httpx

from fleet_server import openid
from fleet_server.cli import credentials
from fleet_server.cli.credentials import Credentials
from fleet_server.openid import Provider, ProviderError, check_url

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
WANTED_SCOPES = ("profile", "email", "groups", "offline_access")
INTERVAL_S = 5.0  # when the provider names none, and what `slow_down` adds (RFC 8628, sections 3.2 and 3.5)
LONGEST_S = 3600.0
EARLY_S = 30.0  # a token that ends so soon is renewed first


@dataclass(frozen=True)
class DeviceCode:
    """What to show, and what to ask with.

    Attributes:
        address: to open in a browser.
        user_code: to type there.
        device_code: secret, for the token endpoint.
        interval_s: between two requests.
        lifetime_s: of the codes.
    """

    address: str
    user_code: str
    device_code: str
    interval_s: float
    lifetime_s: float


def log_in(issuer: str, client_id: str, show: Callable[[DeviceCode], None]) -> Credentials:
    """Ask for codes, show them, and wait until somebody has logged in with them.

    Raises:
        ProviderError: when the provider can't do that, refuses, or nobody logs in in time.
    """
    try:
        check_url(issuer)
    except ValueError as error:
        raise ProviderError(f"the fleet server names the OpenID provider {issuer!r}: {error}") from None
    with openid.client() as http:
        provider = openid.discover(http, issuer)
        if provider.device_authorization_endpoint is None or provider.token_endpoint is None:
            raise ProviderError(f"{issuer} has no device authorization grant (RFC 8628): ask who runs it to allow it")
        code = _begin(http, provider, client_id)
        show(code)
        return _wait(http, provider, client_id, code)


def current_token(url: str) -> str | None:
    """The token that was kept for a server; a provider's that has ended is renewed first where that can be done.

    Raises:
        ProviderError: when it ended and can't be renewed.
    """
    kept = credentials.load(url)
    if kept is None or kept.issuer is None or kept.expires_at - EARLY_S > time.time():
        return None if kept is None else kept.token
    try:
        with credentials.locked():
            kept = credentials.load(url)
            if kept is None or kept.issuer is None or kept.expires_at - EARLY_S > time.time():
                return None if kept is None else kept.token
            fresh = _renew(kept)
            credentials.keep(url, fresh)
            return fresh.token
    except OSError as error:
        raise ProviderError(f"the login can't be kept ({error.strerror}): see XDG_CONFIG_HOME") from None


def revoke(kept: Credentials) -> None:
    """End what can get more tokens (RFC 7009), where the provider has a way to.

    Raises:
        ProviderError: when it does not answer.
    """
    if kept.issuer is None or kept.refresh_token is None:
        return
    with openid.client() as http:
        endpoint = openid.discover(http, kept.issuer).revocation_endpoint
        if endpoint is not None:
            form = {"token": kept.refresh_token, "token_type_hint": "refresh_token", "client_id": kept.client_id}
            openid.ask(http, endpoint, form)


def _begin(http: httpx.Client, provider: Provider, client_id: str) -> DeviceCode:
    # A provider that does not say what it knows may refuse what it does not.
    known = [one for one in WANTED_SCOPES if one in provider.scopes] if provider.scopes else ["profile", "email"]
    form = {"client_id": client_id, "scope": " ".join(["openid", *known])}
    status, said = openid.ask(http, provider.device_authorization_endpoint or "", form)
    if status != HTTPStatus.OK:
        raise _refused(provider, status, said)
    try:
        address = check_url(str(said.get("verification_uri_complete") or said["verification_uri"]))
        user_code, device_code = str(said["user_code"]), str(said["device_code"])
        interval, lifetime = float(said.get("interval", INTERVAL_S)), float(said["expires_in"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProviderError(f"{provider.issuer} answers with no codes as RFC 8628 has them ({error})") from None
    if not user_code.isprintable():
        raise ProviderError(f"{provider.issuer} answers with a code that can't be shown")
    return DeviceCode(address, user_code, device_code, max(1.0, interval), min(lifetime, LONGEST_S))


def _wait(http: httpx.Client, provider: Provider, client_id: str, code: DeviceCode) -> Credentials:
    deadline, interval = time.monotonic() + code.lifetime_s, code.interval_s
    form = {"grant_type": DEVICE_GRANT, "device_code": code.device_code, "client_id": client_id}
    while time.monotonic() + interval < deadline:
        time.sleep(interval)
        try:
            status, said = openid.ask(http, provider.token_endpoint or "", form)
        except ProviderError:
            interval *= 2  # RFC 8628, section 3.5
            continue
        if status == HTTPStatus.OK:
            return _credentials(provider.issuer, client_id, said)
        if said.get("error") == "slow_down":
            interval += INTERVAL_S
        elif said.get("error") == "access_denied":
            raise ProviderError("the login was refused there")
        elif said.get("error") == "expired_token":
            break
        elif said.get("error") != "authorization_pending":
            raise _refused(provider, status, said)
    raise ProviderError("nobody logged in there in time: try again")


def _renew(kept: Credentials) -> Credentials:
    if kept.refresh_token is None:
        raise ProviderError("your login has ended: `shoal login --oidc`")
    with openid.client() as http:
        provider = openid.discover(http, kept.issuer or "")
        if provider.token_endpoint is None:
            raise ProviderError(f"{provider.issuer} names no token_endpoint: `shoal login --oidc`")
        form = {"grant_type": "refresh_token", "refresh_token": kept.refresh_token, "client_id": kept.client_id}
        status, said = openid.ask(http, provider.token_endpoint, form)
    if status != HTTPStatus.OK:
        raise ProviderError("your login has ended, and the provider renews it no longer: `shoal login --oidc`")
    fresh = _credentials(provider.issuer, kept.client_id, said)
    return fresh if fresh.refresh_token else replace(fresh, refresh_token=kept.refresh_token)


def _credentials(issuer: str, client_id: str, said: dict[str, Any]) -> Credentials:
    token, refresh_token = said.get("id_token"), said.get("refresh_token")
    try:
        # Only to know when to renew: the fleet server is who checks it.
        body = str(token).split(".")[1]
        expires_at = float(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise ProviderError(f"{issuer} answers with no ID token: `shoal login --oidc`") from None
    return Credentials(str(token), issuer, client_id, str(refresh_token) if refresh_token else None, expires_at)


def _refused(provider: Provider, status: int, said: dict[str, Any]) -> ProviderError:
    why = str(said.get("error_description") or said.get("error") or status)[:200]
    return ProviderError(f"{provider.issuer} refuses: {''.join(one for one in why if one.isprintable())}")
