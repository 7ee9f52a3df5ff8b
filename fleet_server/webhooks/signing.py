"""Secrets of webhooks; how they sign is `agent.protocol.signatures`, as agents do."""

from __future__ import annotations

import base64
import secrets

from agent.protocol.signatures import PREFIX, headers, key_of

__all__ = ["headers", "key_of", "new_secret"]


def new_secret() -> str:
    """A random secret of 32 bytes."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
