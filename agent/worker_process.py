"""The inference worker as the supervisor sees it: a child process, its channel, and its restarts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from agent.children import end_child
from agent.config import Config
from agent.listeners import Listeners
from agent.serving.framing import FrameChannel
from agent.serving.ipc import FromWorker, Shutdown, ToWorker

# Measured: these keep the worker's memory flat over swaps.
MEMORY_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
GRPC_SETTINGS = {"GRPC_VERBOSITY": "NONE"}  # else whatever clients do wrong is a line in the log
STOP_S = 15.0


class WorkerDied:
    """The worker's stream has ended."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class WorkerProcess:
    """Starts workers, one at a time; each has a generation, so that late words of a dead one are known as such."""

    def __init__(self, config: Config, put: Callable[[Any], None]) -> None:
        self._put = put
        self._listeners = Listeners(config.listen, config.unix_socket)
        self._grpc_addresses = config.grpc.addresses
        self._log_format, self._device_id = config.log_format, config.device_id
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: FrameChannel | None = None
        self.generation = 0

    def place(self) -> tuple[str, str]:
        """Where the local API is: `host:port`, and the path of its Unix socket, empty where there is none."""
        return self._listeners.place

    def start(self) -> None:
        """Start a fresh worker.

        Raises:
            OSError: when the system refuses a process, or an address of the local inference API.
        """
        self.generation += 1
        listeners = [str(one.fileno()) for one in self._listeners.open()]
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "agent.serving.worker", "--fd", str(theirs.fileno()), "--listen", *listeners]
        command += ["--grpc", *self._grpc_addresses] if self._grpc_addresses else []
        command += ["--log-format", self._log_format, "--device", self._device_id]
        descriptors = [theirs.fileno(), *map(int, listeners)]
        environment = {**MEMORY_SETTINGS, **GRPC_SETTINGS, **os.environ}
        try:
            self._process = subprocess.Popen(command, pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = FrameChannel(ours, FromWorker)
        threading.Thread(target=self._read, args=(self._channel, self.generation), daemon=True).start()

    def send(self, message: ToWorker) -> bool:
        """Tell the worker something; false when it is gone."""
        return self._channel is not None and self._channel.send(message)

    def kill(self) -> None:
        """End a worker that does not listen; `WorkerDied` follows."""
        if self._process is not None:
            self._process.kill()

    def reap(self) -> int | None:
        """Make sure a worker that ended its stream is gone; its exit status."""
        if self._process is None:
            return None
        if self._channel is not None:
            self._channel.close()
        return end_child(self._process, 2)

    def stop(self) -> None:
        """Let it answer what has begun, then end it."""
        self.generation += 1
        if self._process is None or self._channel is None:
            self._listeners.close()
            return
        self._channel.send(Shutdown())
        end_child(self._process, STOP_S)
        self._channel.close()
        self._listeners.close()

    def _read(self, channel: FrameChannel, generation: int) -> None:
        while (message := channel.receive()) is not None:
            self._put((generation, message))
        self._put(WorkerDied(generation))
