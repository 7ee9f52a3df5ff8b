"""What `shoal login` keeps: the session token of each server, in a file that its owner alone may read."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path


def _file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "shoal" / "credentials.json"


def _all() -> dict[str, str]:
    try:
        kept = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(url): str(token) for url, token in kept.items()} if isinstance(kept, dict) else {}


def load(url: str) -> str | None:
    """The token that was kept for a server."""
    return _all().get(url.rstrip("/"))


def keep(url: str, token: str | None) -> None:
    """Keep a token for a server, or forget it.

    Raises:
        OSError: when the file can't be written.
    """
    tokens = {one: kept for one, kept in _all().items() if one != url.rstrip("/")}
    if token is not None:
        tokens[url.rstrip("/")] = token
    path = _file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(tokens, file, indent=2)
    draft.replace(path)
