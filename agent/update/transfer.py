"""One content being read from another source than MQTT, in a thread of its own; chunks go to the supervisor's queue.

No more than `AHEAD` chunks are in memory: the thread waits until they are taken. Whoever began a transfer ends it when
it takes too long: `cancel` closes what the thread may be waiting for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger("agent.sources")
AHEAD = 8
_NUMBERS = itertools.count(1)


class SourceError(Exception):
    """A source did not bring what was asked of it.

    Attributes:
        absent: it does not have the content; nothing is wrong with it.
    """

    def __init__(self, detail: str, *, absent: bool = False) -> None:
        super().__init__(detail)
        self.absent = absent


@dataclass(frozen=True)
class SourceChunk:
    """A chunk that came."""

    transfer: int
    index: int
    payload: bytes


@dataclass(frozen=True)
class TransferEnded:
    """A transfer is over: `error` is None when everything came that was asked for."""

    transfer: int
    error: SourceError | None


class Stop:
    """Tells a reading thread to end, and closes what it waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._socket: socket.socket | None = None

    @property
    def is_set(self) -> bool:
        """Whether the thread is to end."""
        return self._set

    def watch(self, sock: socket.socket) -> None:
        """Shut this socket down when asked to stop.

        Raises:
            SourceError: when that was asked already.
        """
        with self._lock:
            if self._set:
                raise SourceError("it was not wanted any more")
            self._socket = sock

    def set(self) -> None:
        """End the thread."""
        with self._lock:
            self._set = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Address:
    """Where a content is.

    Attributes:
        url: of the content.
        ticket: bearer token, for the host of the URL alone.
        context: for `https://`.
        server_name: that the certificate must have, where it is not the host of the URL.
        organization: that the certificate must have as its subject's; empty for any.
        plain: whether a redirect may lead to `http://`.
    """

    url: str
    ticket: str = ""
    context: ssl.SSLContext | None = None
    server_name: str = ""
    organization: str = ""
    plain: bool = False


Reader = Callable[[Stop], Iterator[tuple[int, bytes]]]


class Transfer:
    """A running transfer.

    Args:
        read: gives chunks with their indices; runs in the thread.
        put: takes what comes of it; called from the thread.
    """

    def __init__(self, read: Reader, put: Callable[[SourceChunk | TransferEnded], None]) -> None:
        self.number = next(_NUMBERS)
        self._read = read
        self._put = put
        self._stop = Stop()
        self._ahead = threading.Semaphore(AHEAD)
        threading.Thread(target=self._run, name=f"source-{self.number}", daemon=True).start()

    def taken(self) -> None:
        """A chunk was taken from the queue."""
        self._ahead.release()

    def cancel(self) -> None:
        """End it; what it still puts into the queue is nobody's."""
        self._stop.set()
        self._ahead.release()

    def _run(self) -> None:
        error: SourceError | None = None
        try:
            for index, payload in self._read(self._stop):
                self._ahead.acquire()
                if self._stop.is_set:
                    break
                self._put(SourceChunk(self.number, index, payload))
        except SourceError as problem:
            error = problem
        except Exception as problem:
            log.exception("reading a source failed")
            error = SourceError(f"{type(problem).__name__}: {problem}")
        self._put(TransferEnded(self.number, error))
