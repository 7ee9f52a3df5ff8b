"""Frames of `agent.serving.ipc`: a 4-byte big-endian length and a MessagePack body, over a stream socket."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from agent.serving.ipc import FRAME_LIMIT, Lend

if TYPE_CHECKING:  # who reads such a stream has imported it
    import asyncio

MOST_LISTENERS = 64
_LENGTH = struct.Struct(">I")


def pack(message: Any) -> bytes:
    """A message as a frame."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def lend(sock: socket.socket, told: Lend, listeners: Sequence[socket.socket]) -> None:
    """Tell a new worker what it must know first, and lend it the sockets that it serves on.

    Raises:
        OSError: when it has ended already.
    """
    socket.send_fds(sock, [pack(told)], [one.fileno() for one in listeners])


def borrow(sock: socket.socket) -> tuple[Lend, list[socket.socket]] | None:
    """The other end of `lend`; None where the stream ends before anything comes."""
    header, descriptors, _, _ = socket.recv_fds(sock, _LENGTH.size, MOST_LISTENERS)  # such a short piece is sent whole
    if len(header) < _LENGTH.size:
        return None
    body = sock.recv(_LENGTH.unpack(header)[0], socket.MSG_WAITALL)
    return msgspec.msgpack.decode(body, type=Lend), [socket.socket(fileno=one) for one in descriptors]


class FrameChannel:
    """The blocking side of a stream; `send` may be called from any thread.

    Args:
        sock: a connected stream socket; the channel owns it.
        kind: the union of messages that come in.
    """

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self._sock = sock
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._lock = threading.Lock()

    def send(self, message: Any) -> bool:
        """Send a message; false when the other side is gone."""
        try:
            with self._lock:
                self._sock.sendall(pack(message))
        except OSError:
            return False
        return True

    def receive(self) -> Any | None:
        """The next message; None when the stream has ended or makes no sense."""
        try:
            header = self._exactly(_LENGTH.size)
            length = _LENGTH.unpack(header)[0] if header else FRAME_LIMIT + 1
            body = self._exactly(length) if length <= FRAME_LIMIT else None
            return None if body is None else self._decoder.decode(body)
        except (OSError, msgspec.MsgspecError):
            return None

    def shut(self) -> None:
        """End the stream for both sides; a `receive` that waits in another thread ends too."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """End the stream."""
        self._sock.close()

    def _exactly(self, size: int) -> bytes | None:
        pieces = bytearray()
        while len(pieces) < size:
            piece = self._sock.recv(size - len(pieces))
            if not piece:
                return None
            pieces += piece
        return bytes(pieces)


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any]) -> Any | None:
    """The next message of an asyncio stream; None at its end."""
    try:
        length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
        return decoder.decode(await reader.readexactly(length)) if length <= FRAME_LIMIT else None
    except (EOFError, ConnectionError, msgspec.MsgspecError):
        return None
