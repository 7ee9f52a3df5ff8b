"""A connection to the device's own inference API, over its Unix socket or loopback: one request at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping

from agent.client.blocking import Blocking
from agent.client.http1 import Ask, Content, Reply, ReplyError, ReplyReader, head
from agent.client.waiting import Stream, Waiting, left_s, now


class CutOffError(OSError):
    """The connection ended while a request was under way: the request itself may be why."""


class Link:
    """Kept for the next request.

    Args:
        listen: `host:port` of the API.
        unix_socket: its path; empty to use `listen`.
        waiting: how it waits.
    """

    def __init__(self, listen: str, unix_socket: str, waiting: Waiting) -> None:
        self._listen, self._unix_socket = listen, unix_socket
        self._waiting = waiting
        self._stream: Stream | None = None

    async def ask(self, ask: Ask, until: float | None) -> Reply:
        """One request's answer. Whatever ends it before ends the connection too: the next answer is the next request's.

        Args:
            ask: the request.
            until: when it is given up, by `time.monotonic`; None for never.

        Raises:
            CutOffError: when the connection ends.
            ReplyError: when what comes can't be read.
            TimeoutError: when the answer is not there by then.
            OSError: when nobody is there.
        """
        while True:
            kept = self._stream is not None
            stream = self._stream = self._stream or await self._connect(until)
            try:
                return await self._once(stream, ask, until)
            except (TimeoutError, ReplyError):
                self.close()
                raise
            except OSError as error:
                self.close()
                # A connection that stood idle may have been closed by the other side: that is no failure.
                if not kept:
                    raise CutOffError(str(error) or type(error).__name__) from error
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End it; the next request makes another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def _connect(self, until: float | None) -> Stream:
        try:
            return await self._waiting.connect(self._listen, self._unix_socket, until)
        except TimeoutError:
            left_s(until)
            raise OSError(f"nobody accepts at {self._unix_socket or self._listen}") from None

    async def _once(self, stream: Stream, ask: Ask, until: float | None) -> Reply:
        reader, unsent = ReplyReader(), None
        try:
            await stream.send([head(ask), *ask.body], until)
        except (BrokenPipeError, ConnectionResetError) as error:
            unsent = error  # a request that is refused by its head is answered before it is read
        while reader.reply is None:
            count = await stream.receive(reader.room(), until)
            if not count:
                raise unsent or CutOffError("the connection ended")
            reader.came(count)
        if reader.last or unsent is not None:
            self.close()
        return reader.reply


class Connection:
    """The same for a thread, which it blocks.

    Args:
        listen: `host:port` of the API.
        unix_socket: its path; empty to use `listen`.
    """

    def __init__(self, listen: str, unix_socket: str) -> None:
        self._link = Link(listen, unix_socket, Blocking())

    def ask(self, method: str, path: str, body: Content, headers: Mapping[str, str], wait_s: float | None) -> Reply:
        """One request's answer; see `Link.ask`.

        Args:
            method: of HTTP.
            path: with the query.
            body: whole.
            headers: beside those that are there anyway.
            wait_s: how long it may take; None for ever.
        """
        until = None if wait_s is None else time.monotonic() + wait_s
        return now(self._link.ask(Ask(method, path, [body], headers), until))

    def close(self) -> None:
        """End it; the next request makes another."""
        self._link.close()
