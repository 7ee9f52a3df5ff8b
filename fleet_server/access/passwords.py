"""Passwords: argon2id (RFC 9106) with its library's parameters, a few at a time because each takes 64 MiB."""

from __future__ import annotations

import secrets
import threading
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

AT_ONCE = 2
_hasher = PasswordHasher()
_slots = threading.BoundedSemaphore(AT_ONCE)


def hash_password(password: str) -> str:
    """The hash to store, with its salt and parameters."""
    with _slots:
        return _hasher.hash(password)


def verify_password(stored: str | None, password: str) -> bool:
    """Whether a password has a stored hash; without one (no such user) it takes as long and is false."""
    with _slots:
        try:
            _hasher.verify(stored or _decoy(), password)
        except (VerificationError, InvalidHashError):
            return False
    return stored is not None


@cache
def _decoy() -> str:
    return _hasher.hash(secrets.token_urlsafe())
