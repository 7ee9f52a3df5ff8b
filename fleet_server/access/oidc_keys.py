"""The public keys of an OpenID provider: cached, and asked for anew no more often than is safe."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, Key, KeySet, OKPKey, RSAKey

from fleet_server import openid
from fleet_server.errors import UnavailableError
from fleet_server.openid import ProviderError

log = logging.getLogger(__name__)
FRESH_S = 600.0  # a key that the provider takes away stops to count after this
KEPT_S = 86400.0  # how long they count when the provider does not answer
PAUSE_S = 30.0  # between two requests, whatever keys tokens name
PAUSE_FAILED_S = 5.0  # the same after one that failed
WAITING = 4  # requests that wait for an answer; anybody can send one, and each holds a thread of the server
MAX_KEYS = 100
MIN_RSA_BITS = 2048  # NIST SP 800-131A


@dataclass(frozen=True)
class _Known:
    keys: KeySet
    at: float

    def has(self, kid: str | None) -> bool:
        return len(self.keys.keys) == 1 if kid is None else any(key.kid == kid for key in self.keys)


class ProviderKeys:
    """Keys of one issuer. Thread-safe; nothing is asked before a token needs it.

    Args:
        issuer: whose discovery document names the keys.
        monotonic: a clock in seconds.
    """

    def __init__(self, issuer: str, monotonic: Callable[[], float]) -> None:
        self._issuer = issuer
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._places = threading.Semaphore(WAITING)
        self._known: _Known | None = None
        self._ask_at = float("-inf")
        self._failed = False

    def for_token(self, kid: str | None) -> KeySet:
        """The keys, with that of a token among them if there is one.

        Args:
            kid: the key that the token names.

        Raises:
            UnavailableError: when the provider does not answer, and the key is not known from before.
        """
        usable = self._usable(kid)
        if usable and self._age() < FRESH_S:
            return usable.keys
        crowded = self._monotonic() >= self._ask_at and not self._ask_anew(kid, wait=usable is None)
        usable = self._usable(kid)
        if usable is not None:
            return usable.keys
        if crowded or self._failed or self._known is None:
            raise UnavailableError(
                "oidc_provider", "the OpenID provider does not answer, and its key is not known: try again soon"
            )
        return self._known.keys

    def _ask_anew(self, kid: str | None, *, wait: bool) -> bool:
        """Ask, or wait for who does; False where too many do.

        Who has a key need not wait; who has none must, or every rotation would refuse some.
        """
        if not self._places.acquire(blocking=False):
            return False
        try:
            if self._lock.acquire(blocking=wait):
                try:
                    missing = self._usable(kid) is None
                    if (missing or self._age() >= FRESH_S) and self._monotonic() >= self._ask_at:
                        self._refresh()
                finally:
                    self._lock.release()
        finally:
            self._places.release()
        return True

    def _usable(self, kid: str | None) -> _Known | None:
        known = self._known
        return known if known is not None and known.has(kid) and self._age() < KEPT_S else None

    def _age(self) -> float:
        return float("inf") if self._known is None else self._monotonic() - self._known.at

    def _refresh(self) -> None:
        try:
            keys = _fetch(self._issuer)
            self._known, self._failed = _Known(KeySet(keys), self._monotonic()), False
        except ProviderError as error:
            log.warning("keys of the OpenID provider: %s", error)
            self._failed = True
        self._ask_at = self._monotonic() + (PAUSE_FAILED_S if self._failed else PAUSE_S)


def _fetch(issuer: str) -> list[Key]:
    with openid.client() as http:
        status, said = openid.ask(http, openid.discover(http, issuer).jwks_uri)
    keys = _signing_keys(said.get("keys"))
    if status != HTTPStatus.OK or not keys:
        raise ProviderError(f"the OpenID provider {issuer} answers {status} with no usable key")
    return keys


def _signing_keys(found: object) -> list[Key]:
    """The asymmetric keys for signatures in a JWK set; others are passed over (RFC 7517, section 5)."""
    keys: list[Key] = []
    for data in (found if isinstance(found, list) else [])[:MAX_KEYS]:
        if not isinstance(data, dict) or data.get("use", "sig") != "sig":
            continue
        try:
            key = JWKRegistry.import_key(data)
        except (JoseError, ValueError, TypeError):
            continue
        if isinstance(key, RSAKey):
            if key.public_key.key_size >= MIN_RSA_BITS:
                keys.append(key)
        elif isinstance(key, (ECKey, OKPKey)):
            keys.append(key)
    return keys
