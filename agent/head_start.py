"""Starts the inference worker's process before anything is known of what it is to do.

To import what it needs takes it longer than anything else at a start. So the process is begun first, and imports while
the supervisor does the same, reads its configuration and opens its files; then it is told the rest (`lend`). This
module imports next to nothing on purpose, and must not.
"""

from __future__ import annotations

import _socket  # `socket`, `subprocess` and `dataclasses` take longer to import than the interpreter to start
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Measured: these keep the worker's memory flat over swaps.
MEMORY_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
QUIET_SETTINGS = {
    "GRPC_VERBOSITY": "NONE",  # else whatever clients do wrong is a line in the log
    "OPENBLAS_NUM_THREADS": "1",  # numpy multiplies no matrices here: it need not start a thread a processor
}
# To look for garbage while modules are imported, whose objects all stay, takes a fifth of that time.
WORKER = (
    "import gc; gc.disable(); import agent.serving.plain_asyncio; from agent.serving.worker import main; "
    "gc.freeze(); gc.enable(); main()"
)
OTHERS = frozenset({"facts", "enroll", "bundle", "--help", "-h", "--version"})  # commands that need no worker


class Spawned:
    """A worker's process.

    Args:
        pid: its id.
        descriptor: of our end of its stream; whoever takes it owns it.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self.descriptor = pid, descriptor
        self._status: int | None = None

    def kill(self) -> None:
        """End it at once; nothing where it has ended."""
        if self._poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def end(self, within_s: float) -> int:
        """The exit status of a process that was told to end; one that has not by then is killed."""
        until = time.monotonic() + within_s
        while (status := self._poll()) is None:
            if time.monotonic() >= until:
                self.kill()
            time.sleep(0.005)
        return status

    def _poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


def spawn() -> Spawned:
    """Start a worker. It does nothing before `lend`, and ends when the stream does.

    Raises:
        OSError: when the system refuses a process.
    """
    ours, theirs = _socket.socketpair()
    command = [sys.executable, "-c", WORKER, "--fd", str(theirs.fileno())]
    environment = {**MEMORY_SETTINGS, **QUIET_SETTINGS, **os.environ}
    try:
        os.set_inheritable(theirs.fileno(), True)
        actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(pid, ours.detach())


def spawn_for(arguments: Sequence[str]) -> Spawned | None:
    """Start a worker where the command line means to run the daemon; None where it does not, or it can't be now."""
    if OTHERS.intersection(arguments):
        return None
    try:
        return spawn()
    except OSError:
        return None  # whoever runs the daemon tries again, and says why it can't be
