"""A process that must not outlive the one that started it, nor take it along."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent does, also when that happened before we asked.

    Args:
        parent: process id of who started this one; 0 where that is not known.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        sys.exit(1)


def run_as_child() -> None:
    """`python -m agent.parent PARENT PROGRAM …`: become another program that ends with its parent."""
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 (no shell is what is wanted)


def end_first() -> None:
    """Let the kernel end this process before others when memory is short."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 (pathlib is large)
        file.write("1000")


if __name__ == "__main__":
    run_as_child()
