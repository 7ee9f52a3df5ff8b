"""Bearer tokens: `shoal_<id>_<secret>`. The id finds the row, the secret proves itself against the digest there."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

PREFIX = "shoal"
ID_BYTES = 8
SECRET_BYTES = 32


@dataclass(frozen=True)
class MintedToken:
    """A new token; `text` is shown once and kept nowhere."""

    id: str
    digest: str
    text: str


def mint() -> MintedToken:
    """A token with a new id and 256 random bits."""
    token_id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
    return MintedToken(token_id, digest_of(secret), f"{PREFIX}_{token_id}_{secret}")


def parse(text: str) -> tuple[str, str] | None:
    """Id and secret of a token; None when the text is none."""
    prefix, _, rest = text.partition("_")
    token_id, _, secret = rest.partition("_")
    if prefix != PREFIX or len(token_id) != 2 * ID_BYTES or not secret or not text.isascii():
        return None
    return token_id, secret


def digest_of(secret: str) -> str:
    """What is stored of a secret: SHA-256, which is enough for one that can't be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, digest: str) -> bool:
    """Whether a secret has a digest, in constant time."""
    return secrets.compare_digest(digest_of(secret), digest)
