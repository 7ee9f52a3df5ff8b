"""How both sides write their logs: lines for people, or JSON with the same ids on the server and on devices.

Ids that are known where something is logged are taken along by the context (`log_ids`), or said with the record
(`extra={"deployment": …}`). What looks like a secret is hidden in either form.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from agent.protocol.secrets import HidingFormatter, hide_secrets

FORMS = ("text", "json")
IDS = ("request_id", "fleet", "rollout", "deployment", "device", "trace_id")
_known: ContextVar[dict[str, str] | None] = ContextVar("shoal_log_ids", default=None)


@contextmanager
def log_ids(**ids: str) -> Iterator[None]:
    """Whatever is logged within is about these; those of the context around still hold.

    Threads that are started within know nothing of it.
    """
    token = _known.set({**(_known.get() or {}), **ids})
    try:
        yield
    finally:
        _known.reset(token)


def note_ids(**ids: str) -> None:
    """Ids that turned out within the nearest `log_ids`; without one, nobody is told."""
    known = _known.get()
    if known is not None:
        known.update(ids)


def known_ids() -> Mapping[str, str]:
    """The ids that hold here."""
    return _known.get() or {}


class JsonFormatter(logging.Formatter):
    """One JSON object a record: `time` (RFC 3339, UTC), `level`, `logger`, `message`, ids, and `exception` if any.

    Args:
        ids: that hold for the whole process.
    """

    def __init__(self, ids: Mapping[str, str]) -> None:
        super().__init__()
        self._ids = dict(ids)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        said: dict[str, str] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": hide_secrets(record.getMessage()),
        }
        given = {name: str(value) for name in IDS if (value := getattr(record, name, None)) is not None}
        found = {**self._ids, **known_ids(), **given}
        said |= {name: found[name] for name in IDS if found.get(name)}
        if record.exc_info:
            said["exception"] = hide_secrets(self.formatException(record.exc_info))
        return json.dumps(said, ensure_ascii=False)


def log_to_stderr(level: str, form: str = "text", **ids: str) -> None:
    """Set the process's log up: one line a record on standard error, without secrets.

    Args:
        level: the lowest that is written.
        form: of `FORMS`.
        ids: that hold for the whole process; lines for people do not have them.
    """
    handler = logging.StreamHandler()
    text = HidingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(ids) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler])
