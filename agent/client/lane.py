"""A connection, and the shared memory that belongs to it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from agent.client.connection import Link
from agent.client.encoding import Part, Placed
from agent.client.http1 import Ask, Reply
from agent.client.memory import SharedMemory


class RefusedError(Exception):
    """The API answered that it does not do what it was asked.

    Attributes:
        reply: that says why.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.said)
        self.reply = reply


class _Registered(msgspec.Struct):
    writable: bool = True


class Lane:
    """One request at a time.

    Args:
        link: the connection.
        memory: of its own; None: everything goes by the connection.
    """

    def __init__(self, link: Link, memory: SharedMemory | None) -> None:
        self._link = link
        self.memory = memory

    async def ask(self, ask: Ask, until: float) -> Reply:
        """The answer, where it went well.

        Raises:
            RefusedError: otherwise.
            OSError: when there is none; see `Link.ask`.
        """
        try:
            reply = await self._link.ask(ask, until)
        except BaseException:
            if self.memory is not None:
                self.memory.abandon()  # the request may still be under way there, with outputs that are put into it
            raise
        if reply.status != 200:
            raise RefusedError(reply)
        return reply

    async def place(self, parts: Sequence[Part], room: Mapping[str, int], until: float) -> Placed | None:
        """Put inputs into shared memory, and leave room for outputs.

        Args:
            parts: the inputs; none of them where they go in the body.
            room: how many bytes outputs may have, by name.
            until: when it is given up, by `time.monotonic`.

        Returns:
            Where all that is; None where there is no shared memory, now and from then on.

        Raises:
            OSError: when the API does not answer.
        """
        if self.memory is None:
            return None
        try:
            offsets = self.memory.hold([part.content for part in parts], list(room.values()))
        except OSError:
            await self._without(until)
            return None
        if not self.memory.registered and not await self._register(self.memory, until):
            return None
        rooms = zip(room, zip(offsets[len(parts) :], room.values(), strict=True), strict=True)
        outputs = dict(rooms) if self.memory.writable else {}
        return Placed(self.memory.name, offsets[: len(parts)], outputs) if parts or outputs else None

    async def close(self, until: float) -> None:
        """End it; the API is told what it need not know any more."""
        try:
            await self._without(until)
        finally:
            self._link.close()

    async def _register(self, memory: SharedMemory, until: float) -> bool:
        await self._forget(memory, until)
        body = msgspec.json.encode({"key": f"/{memory.name}", "offset": 0, "byte_size": memory.size})
        try:
            reply = await self.ask(_about(memory.name, "register", body), until)
        except RefusedError:  # the agent's user may not read it, the API is not of this machine, or has no room
            await self._without(until)
            return False
        try:
            told = msgspec.json.decode(reply.body, type=_Registered)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            told = _Registered()  # an agent that does not say
        memory.opened(writable=told.writable)
        return True

    async def _without(self, until: float) -> None:
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.abandon()
            with contextlib.suppress(OSError):  # who does not answer will not know it when it does
                await self._forget(memory, until)

    async def _forget(self, memory: SharedMemory, until: float) -> None:
        while memory.stale:
            with contextlib.suppress(RefusedError):  # it is of no use to either
                await self.ask(_about(memory.stale[-1], "unregister"), until)
            memory.stale.pop()


def _about(region: str, what: str, body: bytes = b"") -> Ask:
    path = f"/v2/systemsharedmemory/region/{region}/{what}"
    return Ask("POST", path, [body], {"Content-Type": "application/json"})
