"""Reads large MQTT messages from a connection with few system calls and no copy: pure but for the reads it is handed.

The library that speaks MQTT reads four bytes one by one before each packet, and copies what follows five times, each
time into fresh memory: for a chunk of an artifact that costs more than hashing and keeping it. So large messages are
read here, straight into a buffer that is used again for later ones; everything else is left for the library.
Packets are laid out as MQTT 5 and 3.1.1 say (OASIS, sections 2.1, 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.protocol.limits import LIMITS

AHEAD = 4096  # bytes read at once where a packet may begin
LARGE = 16 * 1024  # bytes; smaller packets are the library's
BUFFER = LIMITS.chunk_bytes + 1024  # bytes; so are larger ones: no chunk is
SPARE = 2  # buffers that are kept while nothing needs them

Receive = Callable[[memoryview], int]


class MalformedPacketError(Exception):
    """A packet that is none of MQTT."""


class Buffers:
    """Memory for large messages, used again and again. May be used from any thread."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def take(self) -> bytearray:
        """One that nobody uses."""
        try:
            return self._spare.pop()
        except IndexError:
            return bytearray(BUFFER)

    def give(self, buffer: bytearray) -> None:
        """One is not used any more."""
        if len(self._spare) < SPARE:
            self._spare.append(buffer)

    def drop(self) -> None:
        """No large messages are to be expected."""
        self._spare.clear()


@dataclass(frozen=True)
class LargeMessage:
    """A message that was read here.

    Attributes:
        payload: lies in the buffer.
        message_id: to be acknowledged; None where nothing is.
    """

    topic: str
    payload: memoryview
    buffer: bytearray
    message_id: int | None


class PacketReader:
    """Reads one connection.

    Args:
        buffers: for large messages.
        five: whether the connection speaks MQTT 5, whose messages have properties.
    """

    def __init__(self, buffers: Buffers, *, five: bool) -> None:
        self._buffers = buffers
        self._five = five
        self._ahead = memoryview(bytearray(AHEAD))
        self._start = self._end = 0  # of what was read ahead and belongs to nobody yet
        self._flags = 0
        self._buffer: bytearray | None = None  # of the large message that is being read
        self._length = self._got = 0

    @property
    def holds(self) -> bool:
        """Whether something was read ahead."""
        return self._start < self._end

    def take(self, size: int) -> bytes:
        """Of what was read ahead, at most so many bytes: they are the library's."""
        end = min(self._end, self._start + size)
        taken = bytes(self._ahead[self._start : end])
        self._start = end
        return taken

    def begins(self, receive: Receive) -> bool:
        """At the beginning of a packet: whether a large message begins, or is being read already.

        Raises:
            EOFError: when the connection has ended.
            BlockingIOError: when there is nothing to be read.
        """
        if self._buffer is not None:
            return True
        if not self.holds:
            self._start, self._end = 0, _some(receive(self._ahead))
        command, position, length, shift = self._ahead[self._start], self._start + 1, 0, 0
        if command & 0xF0 != 0x30 or command & 0x06 > 2:
            return False
        while position < self._end and shift <= 21:
            byte = self._ahead[position]
            length |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                if not LARGE <= length <= BUFFER:
                    return False
                self._begin(command, position, length)
                return True
        return False  # the library waits for the rest of its beginning

    def read(self, receive: Receive) -> LargeMessage:
        """The rest of a large message.

        Raises:
            EOFError: when the connection has ended.
            BlockingIOError: when the rest is not there yet.
            MalformedPacketError: when it is none.
        """
        assert self._buffer is not None
        view = memoryview(self._buffer)
        while self._got < self._length:
            self._got += _some(receive(view[self._got : self._length]))
        buffer, self._buffer = self._buffer, None
        return self._message(view[: self._length], buffer)

    def _begin(self, command: int, position: int, length: int) -> None:
        self._flags, self._length = command, length
        self._buffer = self._buffers.take()
        self._got = min(length, self._end - position)
        self._buffer[: self._got] = self._ahead[position : position + self._got]
        self._start = position + self._got

    def _message(self, packet: memoryview, buffer: bytearray) -> LargeMessage:
        position = 2 + int.from_bytes(packet[:2], "big")
        try:
            topic = str(packet[2:position], "utf-8")
        except UnicodeDecodeError:
            raise MalformedPacketError("its topic is no text") from None
        message_id = None
        if self._flags & 0x06:
            message_id = int.from_bytes(packet[position : position + 2], "big")
            position += 2
        if self._five:
            position = _after_properties(packet, position)
        if not topic or position > len(packet):
            raise MalformedPacketError("its header is longer than it is")
        return LargeMessage(topic, packet[position:], buffer, message_id)


def _some(count: int) -> int:
    if count == 0:
        raise EOFError
    return count


def _after_properties(packet: memoryview, position: int) -> int:
    """Where the properties end; what they say is of no use to a device."""
    length = 0
    for shift, byte in zip((0, 7, 14, 21), packet[position : position + 4], strict=False):
        length |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return position + length
    raise MalformedPacketError("its properties have no length")
