"""An inference worker without a supervisor: the real process, told what to do by whoever starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from agent.listeners import Listeners
from agent.serving.framing import FrameChannel
from agent.serving.ipc import Expect, FromWorker, Ready
from agent.worker_process import MEMORY_SETTINGS


@dataclass(frozen=True)
class ServingWorker:
    """It takes requests already."""

    process: subprocess.Popen[bytes]
    channel: FrameChannel
    url: str

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


def start_worker(unix_socket: str = "", environment: Mapping[str, str] | None = None) -> ServingWorker:
    """Start one on a port of its own; its streams end when the channel is closed, and so does it."""
    ours, theirs = socket.socketpair()
    listeners = Listeners("127.0.0.1:0", unix_socket).open()
    lent = [str(one.fileno()) for one in listeners]
    command = [sys.executable, "-m", "agent.serving.worker", "--fd", str(theirs.fileno()), "--listen", *lent]
    process = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno(), *map(int, lent)],
        env={**MEMORY_SETTINGS, **os.environ, **(environment or {})},
    )
    for one in (theirs, *listeners):
        one.close()
    channel = FrameChannel(ours, FromWorker)
    ready = channel.receive()
    assert isinstance(ready, Ready)
    channel.send(Expect(()))
    return ServingWorker(process, channel, ready.url)
