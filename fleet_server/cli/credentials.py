"""What `shoal login` keeps: the token of each server, in a file that its owner alone may read."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Credentials:
    """A token for a server.

    Attributes:
        token: what proves who one is.
        issuer: the OpenID provider that made the token; None for a session of the server.
        client_id: of the server there.
        refresh_token: gets another token there, where the provider gave one.
        expires_at: when the token of a provider ends, as Unix time.
    """

    token: str
    issuer: str | None = None
    client_id: str = ""
    refresh_token: str | None = None
    expires_at: float = 0.0


def _file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "shoal" / "credentials.json"


def _all() -> dict[str, Any]:
    try:
        kept = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def load(url: str) -> Credentials | None:
    """What was kept for a server."""
    kept = _all().get(url.rstrip("/"))
    if isinstance(kept, str):
        return Credentials(kept)
    try:
        return Credentials(**kept) if isinstance(kept, dict) else None
    except TypeError:
        return None


def keep(url: str, wanted: Credentials | None) -> None:
    """Keep credentials for a server, or forget them.

    Raises:
        OSError: when the file can't be written.
    """
    kept = {one: value for one, value in _all().items() if one != url.rstrip("/")}
    if wanted is not None:
        kept[url.rstrip("/")] = wanted.token if wanted.issuer is None else asdict(wanted)
    path = _file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(kept, file, indent=2)
    draft.replace(path)


@contextmanager
def locked() -> Iterator[None]:
    """One command at a time: a refresh token serves once, and two that use it look like theft to the provider.

    Raises:
        OSError: when the lock's file can't be written.
    """
    path = _file().with_name("credentials.lock")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
