"""Who a token of the OpenID provider speaks for, and which roles its claims give."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from joserfc import jws, jwt
from joserfc.errors import ClaimError, ExpiredTokenError, JoseError
from joserfc.jws import JWSRegistry

from fleet_server.access.oidc_keys import ProviderKeys
from fleet_server.errors import UnauthorizedError
from fleet_server.principals import Role
from fleet_server.settings import EVERY_FLEET, Settings

# Asymmetric ones only: with HS256 among them, a public key would do as the secret (RFC 8725, section 2.1).
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519")
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # logout tokens and others are no proof (RFC 8725, 3.11)
MAX_TOKEN_CHARS = 16384
MAX_HEADER_BYTES = 4096
MAX_SUBJECT_CHARS = 255  # OpenID Connect Core 1.0, section 2
LEEWAY_S = 30  # that the clocks of provider and server may differ
NAMES = ("preferred_username", "email", "sub")
NAME_CHARS = 64
OIDC_PREFIX = "oidc/"  # of ids and names of these principals
_MALFORMED = (JoseError, ValueError, TypeError, AttributeError, KeyError, RecursionError)


@dataclass(frozen=True)
class Person:
    """Who a token speaks for.

    Attributes:
        id: made of issuer and subject, which nobody else ever has.
        name: as the provider has it, with a part of the id, for people may choose the former themselves.
        roles: by fleet; `EVERY_FLEET` stands for all.
    """

    id: str
    name: str
    roles: Mapping[str, Role]

    def role_in(self, fleet_id: str) -> Role | None:
        """Their role in a fleet; None without one."""
        found = [self.roles[one] for one in (fleet_id, EVERY_FLEET) if one in self.roles]
        return _highest(found) if found else None


class OidcVerifier:
    """Checks tokens of one issuer that were made for this server.

    Args:
        issuer: what must stand in `iss`.
        client_id: what must stand in `aud`.
        claim: the claim whose values give roles.
        roles: from a value of that claim to roles by fleet.
        longest: how long after it was issued a token counts at most.
        keys: of the issuer.
    """

    def __init__(
        self,
        *,
        issuer: str,
        client_id: str,
        claim: str,
        roles: Mapping[str, Mapping[str, str]],
        longest: dt.timedelta,
        keys: ProviderKeys,
    ) -> None:
        self._issuer = issuer
        self._client_id = client_id
        self._claim = claim
        self._roles = roles
        self._longest = longest
        self._keys = keys
        # Unknown header parameters are ignored, as RFC 7515, section 4 asks; those that are critical are refused.
        self._registry = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
        self._registry.max_header_length = MAX_HEADER_BYTES

    @classmethod
    def of(cls, settings: Settings, monotonic: Callable[[], float]) -> Self | None:
        """That of the settings; None where they name no provider."""
        if settings.oidc_issuer is None or settings.oidc_client_id is None:
            return None
        return cls(
            issuer=settings.oidc_issuer,
            client_id=settings.oidc_client_id,
            claim=settings.oidc_claim,
            roles=settings.oidc_roles,
            longest=dt.timedelta(hours=settings.session_hours),
            keys=ProviderKeys(settings.oidc_issuer, monotonic),
        )

    def identify(self, text: str, now: dt.datetime) -> Person:
        """Who a token speaks for (OpenID Connect Core 1.0, section 3.1.3.7; RFC 8725).

        Raises:
            UnauthorizedError: when it is none of this issuer for this server, or is over.
            UnavailableError: when its key is not known and the provider does not answer.
        """
        claims = self._signed_claims(text)
        self._check(claims, now)
        subject = claims["sub"]
        if len(subject) > MAX_SUBJECT_CHARS:
            raise _refused("its subject is longer than 255 characters")
        digest = hashlib.sha256(f"{self._issuer}\0{subject}".encode(errors="surrogatepass")).hexdigest()[:32]
        label = next((one for name in NAMES if (one := _printable(claims.get(name)))), "?")
        roles = roles_of(claims.get(self._claim), self._roles)
        return Person(f"{OIDC_PREFIX}{digest}", f"{OIDC_PREFIX}{label}#{digest[:8]}", roles)

    def _signed_claims(self, text: str) -> dict[str, Any]:
        if len(text) > MAX_TOKEN_CHARS:
            raise _refused(f"it has more than {MAX_TOKEN_CHARS} characters")
        try:
            header = jws.extract_compact(text.encode(), registry=self._registry).headers()
            algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
            usable = algorithm in ALGORITHMS and isinstance(kid, str | None) and kind.lower() in TYPES
        except _MALFORMED:
            raise _refused("it can't be read") from None
        if not usable:
            raise _refused("it is of a kind, or signed by an algorithm, that proves nothing here")
        keys = self._keys.for_token(kid)
        try:
            return jwt.decode(text, keys, registry=self._registry).claims
        except _MALFORMED:
            raise _refused("its signature is none of the provider's") from None

    def _check(self, claims: dict[str, Any], now: dt.datetime) -> None:
        moment = int(now.timestamp())
        rules = jwt.JWTClaimsRegistry(
            now=moment,
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self._issuer},
            aud={"essential": True, "value": self._client_id},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        try:
            rules.validate(claims)
        except ExpiredTokenError:
            raise _refused("it has expired") from None
        except ClaimError as error:
            raise _refused(f"its claim {error.claim!r} does not fit this server") from None
        if moment - claims["iat"] > self._longest.total_seconds() + LEEWAY_S:
            raise _refused("it was issued longer ago than SHOAL_SESSION_HOURS")


def roles_of(values: object, mapping: Mapping[str, Mapping[str, str]]) -> dict[str, Role]:
    """The roles by fleet that the values of a claim give: of several in a fleet the highest."""
    given = [values] if isinstance(values, str) else values if isinstance(values, list) else []
    found: dict[str, list[Role]] = {}
    for value in given:
        for fleet_id, role in mapping.get(value, {}).items() if isinstance(value, str) else ():
            found.setdefault(fleet_id, []).append(Role(role))
    return {fleet_id: _highest(found[fleet_id]) for fleet_id in sorted(found)}


def _highest(roles: list[Role]) -> Role:
    return max(roles, key=list(Role).index)


def _printable(value: object) -> str:
    """Text of a claim that can stand in a log, or nothing."""
    return "".join(one for one in value if one.isprintable())[:NAME_CHARS] if isinstance(value, str) else ""


def _refused(why: str) -> UnauthorizedError:
    return UnauthorizedError(
        "not_authenticated", f"the token of the OpenID provider does not hold: {why}; log in again"
    )
