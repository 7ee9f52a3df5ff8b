"""Who was let in a moment ago: what the database said of a proof is believed for two seconds. Thread-safe.

A request that changes something empties it before its answer is sent: so whoever revoked a token, ended a session or
took a role away, and has the answer, knows that this server lets nobody in by it any more. Another server of the same
database learns of it within `KEPT_S`.

Tokens of an OpenID provider are not kept: nothing here is told when one of them, or a key of the provider, counts no
more.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fleet_server.access.authentication import Proof
from fleet_server.access.oidc import OIDC_PREFIX
from fleet_server.principals import Principal

KEPT_S = 2.0
MOST = 10_000


@dataclass(frozen=True)
class _Let:
    principal: Principal
    until: float


class KnownPrincipals:
    """Principals by what they proved themselves with; it holds hashes of that.

    Args:
        monotonic: a clock in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._let: dict[bytes, _Let] = {}
        self._forgotten = 0

    @property
    def forgotten(self) -> int:
        """How often everybody was forgotten; read it before the database is asked."""
        return self._forgotten

    def get(self, proof: Proof) -> Principal | None:
        """Whom a proof is of; None where the database has to say so."""
        found = self._let.get(_key(proof))
        return found.principal if found is not None and self._monotonic() < found.until else None

    def keep(self, proof: Proof, principal: Principal, forgotten: int) -> None:
        """Believe it for a while, if it is a proof that this server made.

        Args:
            proof: what the request brought.
            principal: as the database said.
            forgotten: how often everybody had been forgotten before it was asked: what it said then may hold no more.
        """
        if principal.id.startswith(OIDC_PREFIX):
            return
        with self._lock:
            if forgotten != self._forgotten:
                return
            if len(self._let) >= MOST:
                self._let.clear()
            self._let[_key(proof)] = _Let(principal, self._monotonic() + KEPT_S)

    def forget(self) -> None:
        """Let the database say of everybody anew."""
        with self._lock:
            self._let.clear()
            self._forgotten += 1


def _key(proof: Proof) -> bytes:
    said = f"{proof.fleet_id or ''}\n{proof.authorization or ''}"
    return hashlib.sha256(said.encode(errors="surrogatepass")).digest()
