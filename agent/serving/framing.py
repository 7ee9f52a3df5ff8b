"""Frames of `agent.serving.ipc`: a 4-byte big-endian length and a MessagePack body, over a stream socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Any

import msgspec

from agent.serving.ipc import FRAME_LIMIT

_LENGTH = struct.Struct(">I")


def pack(message: Any) -> bytes:
    """A message as a frame."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


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
    except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
        return None
