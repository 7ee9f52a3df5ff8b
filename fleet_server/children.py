"""Processes that the server starts: how they end with it, how they are ended, and what they said last."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from pathlib import Path

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, for between fork and exec there is time for one call only


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends: to be called before exec."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it started, which share a process group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def last_words(path: Path, most: int) -> str:
    """The end of what a child wrote to a file, at most so many bytes of it."""
    return path.read_bytes()[-most:].decode(errors="replace").strip()
