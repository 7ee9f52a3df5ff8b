"""Who may use the API: one admin token for now, compared in constant time."""

from __future__ import annotations

import secrets

from fleet_server.errors import UnauthorizedError


def check_token(expected: str | None, header: str | None) -> None:
    """Let a request pass when no token is set, or when its Authorization header carries it.

    Raises:
        UnauthorizedError: otherwise.
    """
    if expected is None:
        return
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(token.encode(), expected.encode()):
        raise UnauthorizedError(
            "not_authenticated", "send `Authorization: Bearer <token>`, or set SHOAL_TOKEN for the command line"
        )
