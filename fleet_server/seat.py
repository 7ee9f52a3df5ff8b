"""The name of this server, which it has again after a restart: a file of the state folder that it holds locked.

Who holds the name holds what the name holds: a server that was killed goes on at once with its leases, and several that
share a state folder never have the same. The lock ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from fleet_server.errors import UnavailableError

MOST_SERVERS = 16  # of one database: broker configurations name so many
FOLDER = "servers"
SUFFIX = ".lock"


class Seat:
    """A name, held until it is closed.

    Args:
        state_dir: of the server; names are kept below it.

    Raises:
        UnavailableError: when the folder can't be written.
    """

    def __init__(self, state_dir: Path) -> None:
        folder = state_dir / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.name, self._descriptor = _taken(folder)
        except OSError as error:
            detail = f"the state folder {state_dir} can't be used ({error.strerror}): set SHOAL_STATE_DIR"
            raise UnavailableError("state_dir", detail) from None

    def close(self) -> None:
        """Let another process have the name; called once."""
        os.close(self._descriptor)


def _taken(folder: Path) -> tuple[str, int]:
    """A name that nobody has, with its open file: one that was had before, or else a new one."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        descriptor = _held(path)
        if descriptor is not None:
            return path.name.removesuffix(SUFFIX), descriptor
    while True:
        name = secrets.token_hex(6)
        descriptor = _held(folder / f"{name}{SUFFIX}")
        if descriptor is not None:
            return name, descriptor


def _held(path: Path) -> int | None:
    """The open and locked file; None when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
