"""One connection to the device's own inference API, over its Unix socket or loopback: one request at a time."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

CONNECT_S = 5.0
ANSWER_LIMIT = 64 << 20
Body = bytes | list[bytes | memoryview]


class CutOffError(OSError):
    """The connection ended while a request was under way: the request itself may be why."""


@dataclass(frozen=True)
class Reply:
    """What the API answered.

    Attributes:
        status: of HTTP.
        headers: by their names in small letters.
        body: whole.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> str:
        """The error in words."""
        try:
            told = msgspec.json.decode(self.body[:65536])
            text = str(told["error"]) if isinstance(told, dict) and "error" in told else ""
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            text = ""
        return f"the inference API answered {self.status}{': ' if text else ''}{text[:500]}"

    @property
    def again_after_s(self) -> float:
        """When it asks to be asked again, in seconds; 0 where it does not say."""
        wait = self.headers.get("retry-after", "")
        return float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0


class Connection:
    """Kept for the next request.

    Args:
        listen: `host:port` of the API.
        unix_socket: its path; empty to use `listen`.
    """

    def __init__(self, listen: str, unix_socket: str) -> None:
        self._listen, self._unix_socket = listen, unix_socket
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: Body, headers: Mapping[str, str], wait_s: float | None) -> Reply:
        """One request's answer.

        Args:
            method: of HTTP.
            path: with the query.
            body: whole, or its parts in their order.
            headers: beside those that are there anyway.
            wait_s: how long nothing may come; None for ever.

        Raises:
            CutOffError: when the connection ends, or nothing that makes sense comes.
            TimeoutError: when nothing comes for so long.
            OSError: when nobody is there.
        """
        while True:
            kept = self._connection is not None
            try:
                connection = self._connection = self._connection or self._connect()
                return self._once(connection, method, path, body, headers, wait_s)
            except TimeoutError:
                self.close()
                raise
            except (OSError, http.client.HTTPException) as error:
                connected = self._connection is not None
                self.close()
                # A connection that stood idle may have been closed by the other side: that is no failure.
                if not kept:
                    if not connected:
                        raise
                    raise CutOffError(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """End it; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _once(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Body,
        headers: Mapping[str, str],
        wait_s: float | None,
    ) -> Reply:
        connection.sock.settimeout(wait_s)
        if isinstance(body, list):
            length = sum(len(part) for part in body)
            connection.request(method, path, body=body, headers={**headers, "Content-Length": str(length)})
        else:
            connection.request(method, path, body=body or None, headers=dict(headers))
        response = connection.getresponse()
        content = response.read(ANSWER_LIMIT + 1)
        if len(content) > ANSWER_LIMIT:
            raise OSError(f"an answer has more than {ANSWER_LIMIT} bytes")
        if response.will_close:
            self.close()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def _connect(self) -> http.client.HTTPConnection:
        if self._unix_socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_S)
            try:
                sock.connect(self._unix_socket)
            except OSError:
                sock.close()
                raise
        else:
            sock = socket.create_connection(own_address(self._listen), timeout=CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        return connection


def own_address(listen: str) -> tuple[str, int]:
    """Where a server that listens at `host:port` is reached from its own machine."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host), int(port)  # noqa: S104
