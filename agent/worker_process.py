"""The inference worker as the supervisor sees it: a child process, its channel, and its restarts."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.config import Config
from agent.head_start import Spawned, spawn
from agent.listeners import Listeners
from agent.peers.balancing import takes_peers
from agent.serving.framing import FrameChannel, lend
from agent.serving.ipc import FromWorker, Lend, Shutdown, ToWorker

log = logging.getLogger("agent.balancing")
STOP_S = 15.0


class WorkerDied:
    """The worker's stream has ended."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class WorkerProcess:
    """Starts workers, one at a time; each has a generation, so that late words of a dead one are known as such.

    Args:
        config: where the worker serves.
        put: takes what it says, and its end; called from a thread.
        spawned: the first one's process, where that was begun before.
        inherited: descriptors of sockets that listen already.
    """

    def __init__(
        self,
        config: Config,
        put: Callable[[Any], None],
        spawned: Spawned | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self._put = put
        self._spawned = spawned
        self._listeners = Listeners(config.listen, config.unix_socket, inherited)
        self._peers_at = config.balancing.listen
        self._for_peers = Listeners(config.balancing.listen, "") if takes_peers(config) else None
        self._lend = Lend(tuple(config.grpc.addresses), config.log_format, config.device_id)
        self._process: Spawned | None = None
        self._channel: FrameChannel | None = None
        self.generation = 0

    def place(self) -> tuple[str, str]:
        """Where the local API is: `host:port`, and the path of its Unix socket, empty where there is none."""
        return self._listeners.place

    @property
    def pid(self) -> int:
        """Of the process; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def peer_place(self) -> str | None:
        """Where peers connect, `host:port`; None where they do not."""
        if self._for_peers is None:
            return None
        host, _, port = self._peers_at.rpartition(":")
        return f"{host}:{self._for_peers.place[0].rpartition(':')[2] if int(port) == 0 else port}"

    def start(self) -> None:
        """Start a fresh worker.

        Raises:
            OSError: when the system refuses a process, or an address of the local inference API.
        """
        self.generation += 1
        listeners, for_peers = self._listeners.open(), self._open_for_peers()
        self._process, self._spawned = self._spawned or spawn(), None
        sock = socket.socket(fileno=self._process.descriptor)
        with contextlib.suppress(OSError):  # it has ended already, which is noticed like any end
            told = msgspec.structs.replace(self._lend, for_peers=len(for_peers))
            lend(sock, told, [*listeners, *for_peers])
        self._channel = FrameChannel(sock, FromWorker)
        threading.Thread(target=self._read, args=(self._channel, self.generation), daemon=True).start()

    def _open_for_peers(self) -> list[socket.socket]:
        """Sockets that peers connect to; without them this machine is served all the same."""
        try:
            return [] if self._for_peers is None else self._for_peers.open()
        except OSError as error:
            log.error("balancing.listen: peers can't be served there: %s", error)  # noqa: TRY400 (it says it all)
            return []

    def _close(self) -> None:
        self._listeners.close()
        if self._for_peers is not None:
            self._for_peers.close()

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
        return self._process.end(2)

    def hand_over(self, *, answering: bool) -> tuple[list[int], int | None]:
        """Give up the sockets, and a worker that goes on answering, for another supervisor.

        Args:
            answering: whether the worker is handed over too; else it ends as by `stop`.

        Returns:
            Descriptors of sockets that listen, and of our end of the worker's stream; None where that has ended.
        """
        listeners = [one.fileno() for one in self._listeners.open()]
        if answering and self._channel is not None:
            self.generation += 1
            return listeners, self._channel.fileno()
        self.generation += 1
        if self._process is not None and self._channel is not None:
            self._channel.send(Shutdown())
            self._process.end(STOP_S)
        return listeners, None

    def stop(self) -> None:
        """Let it answer what has begun, then end it."""
        self.generation += 1
        if self._spawned is not None:  # it was never told to begin
            os.close(self._spawned.descriptor)
            self._spawned.end(STOP_S)
        if self._process is None or self._channel is None:
            self._close()
            return
        self._channel.send(Shutdown())
        self._process.end(STOP_S)
        self._channel.close()
        self._close()

    def _read(self, channel: FrameChannel, generation: int) -> None:
        while (message := channel.receive()) is not None:
            self._put((generation, message))
        self._put(WorkerDied(generation))
