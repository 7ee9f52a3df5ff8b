"""The first admin token: made at the first start where the settings name none, and kept for its owner alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from fleet_server.errors import UnavailableError

FILE = "admin-token"


def bootstrap_token(state_dir: Path) -> str:
    """The token in the state folder; it is made when it is not there.

    Raises:
        UnavailableError: when others may read the file, or it holds no token.
    """
    path = state_dir / FILE
    if not path.exists():
        _make(path)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UnavailableError("admin_token", f"others may read {path}: remove it, and start again to have a new one")
    token = path.read_text().strip()
    if not token:
        raise UnavailableError("admin_token", f"{path} is empty: remove it, and start again to have a new one")
    return token


def _make(path: Path) -> None:
    """Whole or not at all, and the first of two servers that start at once wins."""
    draft = path.with_name(f"{FILE}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"shoal_admin_{secrets.token_urlsafe(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
