"""Values of `[[pipelines]]` tables, and what is wrong with them. Pure, but for whether files are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from agent.errors import ConfigError
from agent.tables import Table

LONGEST_URL = 2000


def choice_of(table: Table, key: str, default: str, known: Sequence[str]) -> str:
    """One of what is known.

    Raises:
        ConfigError: naming the key, as all here do.
    """
    value = table.text(key, default)
    if value not in known:
        raise ConfigError(f"{table.name}.{key}: {value[:64]!r} is not one of {', '.join(known)}")
    return value


def path_of(table: Table, key: str) -> str:
    """An absolute path."""
    value = table.text(key, "")
    check_path(f"{table.name}.{key}", value, "/var/spool/camera")
    return value


def check_path(key: str, value: str, example: str) -> None:
    """Refuse what is no absolute path."""
    if not value.startswith("/") or "\0" in value or len(value) > LONGEST_URL:
        raise ConfigError(f"{key}: {value[:200]!r} is no absolute path, such as {example}")


def file_of(table: Table, key: str) -> str:
    """A file that can be read; empty where none is named."""
    value = table.text(key, "")
    if value and not os.access(value, os.R_OK):
        raise ConfigError(f"{table.name}.{key}: {value[:200]!r} can't be read: name a file that can, or leave it out")
    return value


def broker_of(table: Table) -> str:
    """Where a broker is."""
    url = table.text("url", "")
    check_url(f"{table.name}.url", url, ("mqtt", "mqtts"), "mqtt://10.0.0.5:1883")
    return url


def check_url(key: str, value: str, schemes: tuple[str, ...], example: str) -> None:
    """Refuse what is no URL of these schemes. It is not repeated in errors: it may hold a password."""
    try:
        parts = urlsplit(value)
        fits = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not value.isascii() or not value.isprintable() or " " in value or len(value) > LONGEST_URL:
        raise ConfigError(f"{key}: this is no {':// or '.join(schemes)}:// address, such as {example}")


def is_topic(topic: str) -> bool:
    """Whether a text is a topic, or a filter of topics, as far as its characters go."""
    return 0 < len(topic.encode()) <= 1024 and topic.isprintable()
