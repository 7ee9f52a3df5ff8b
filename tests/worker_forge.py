"""Inference workers forked from a process that has imported what one needs: a start costs a tenth of one.

From there on each is `agent.serving.worker`: killed, it is as dead as any other. This file is run as that process, too.
"""

from __future__ import annotations

import atexit
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = struct.Struct("i")


class ForgedWorker:
    """One of them, with the part of `subprocess.Popen` that tests use.

    Args:
        stream: the worker's end of its channel; it stays the caller's to close.
        environment: of the process that all are forked from.
    """

    def __init__(self, stream: socket.socket, environment: dict[str, str]) -> None:
        self._said, said = os.pipe()
        try:
            socket.send_fds(_forge(tuple(sorted(environment.items()))), [b"one"], [stream.fileno(), said, 1, 2])
        finally:
            os.close(said)
        self.returncode: int | None = None
        (self.pid,) = NUMBER.unpack(os.read(self._said, NUMBER.size))

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            subprocess.TimeoutExpired: when it has not, in so many seconds.
        """
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("agent.serving.worker", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._said], [], [], seconds)[0]:
            (self.returncode,) = NUMBER.unpack(os.read(self._said, NUMBER.size))
            os.close(self._said)
        return self.returncode


@cache
def _forge(environment: tuple[tuple[str, str], ...]) -> socket.socket:
    """Where workers are asked for; the process ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.worker_forge", str(theirs.fileno())]
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(20)

    atexit.register(end)
    return ours


def main() -> None:
    """Fork a worker whenever one is asked for, until nobody can ask any more; in each, be it."""
    import agent.serving.plain_asyncio  # first, as in a worker

    # isort: split
    import agent.runtimes.onnx  # noqa: F401 (what the first load would import)
    from agent.serving import worker

    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 16, 4)
        if not asked:
            return
        if os.fork() == 0:
            control.close()
            _leave_to_child(*descriptors)
            worker.main()
            return
        for one in descriptors:
            os.close(one)


def _leave_to_child(stream: int, said: int, out: int, err: int) -> None:
    """Go on as a child of this process, which tells its id, waits for it and tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        for one in (stream, out, err):
            os.close(one)
        os.write(said, NUMBER.pack(child))
        _, status = os.waitpid(child, 0)
        os.write(said, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    os.close(said)
    for own, given in ((1, out), (2, err)):
        os.dup2(given, own)
        os.close(given)
    sys.argv = ["-c", "--fd", str(stream)]


if __name__ == "__main__":
    main()
