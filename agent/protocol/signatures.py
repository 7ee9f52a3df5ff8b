"""Signatures of Standard Webhooks 1.0 (https://www.standardwebhooks.com): HMAC-SHA256 over id, time and body. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"
SHORTEST, LONGEST = 24, 64  # bytes of a secret, as the specification bounds them


def key_of(secret: str) -> bytes:
    """The bytes of a secret.

    Raises:
        ValueError: where it is none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(PREFIX) or not SHORTEST <= len(key) <= LONGEST:
        raise ValueError(f"it is not {PREFIX} and the base64 of {SHORTEST} to {LONGEST} random bytes; leave it out")
    return key


def headers(keys: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a signed message; with several secrets a receiver may know any of them.

    Args:
        keys: secrets, of which each signs.
        message_id: the event's; the same when it is sent again.
        timestamp: of this try, in whole seconds since 1970.
        body: as it is sent.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(key_of(one), signed, hashlib.sha256)).decode() for one in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{one}" for one in signatures),
    }
