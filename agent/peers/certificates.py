"""Who a certificate says somebody is, of what `ssl` makes of one that it has verified. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def organization_of(certificate: Mapping[str, Any] | None) -> str:
    """The fleet that it names; empty when it names none."""
    return _named(certificate, "organizationName")


def device_of(certificate: Mapping[str, Any] | None) -> str:
    """The device that it names; empty when it names none."""
    return _named(certificate, "commonName")


def _named(certificate: Mapping[str, Any] | None, name: str) -> str:
    pairs = [pair for part in (certificate or {}).get("subject", ()) for pair in part]
    return next((str(pair[1]) for pair in pairs if pair[0] == name), "")
