"""The sockets of the local inference API.

The supervisor holds them for as long as it lives and lends them to each worker. So clients that come while a worker
starts anew wait for it, and none is turned away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKLOG = 512
ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})  # an address family that this machine does not have


class Listeners:
    """Sockets that listen.

    Args:
        listen: `host:port`; a name may have several addresses.
        unix_path: of a Unix socket; empty for none.
        inherited: descriptors of sockets that listen already; those at other addresses are closed.
    """

    def __init__(self, listen: str, unix_path: str, inherited: Sequence[int] = ()) -> None:
        host, _, port = listen.rpartition(":")
        self._address = (host.strip("[]") or "127.0.0.1", int(port))
        self._unix_path = unix_path
        self._sockets: list[socket.socket] = []
        self._inherited = list(inherited)

    def open(self) -> list[socket.socket]:
        """All of them, made where they are not there yet.

        Raises:
            OSError: when an address can't be had.
        """
        if not self._sockets:
            found = [socket.socket(fileno=one) for one in self._inherited]
            self._inherited = []
            try:
                self._listen_tcp(found)
                if self._unix_path:
                    self._listen_unix(found)
            except OSError:
                self._close()
                raise
            finally:
                for one in found:  # at addresses that are configured no more
                    one.close()
        return self._sockets

    @property
    def place(self) -> tuple[str, str]:
        """Where to connect from this machine: `host:port`, and the path of the Unix socket, empty for none."""
        host, port = self._address
        for one in self._sockets:
            if one.family != socket.AF_UNIX:
                host, port = one.getsockname()[:2]
                break
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._unix_path

    def close(self) -> None:
        """Listen no more."""
        if self._sockets and self._unix_path:
            with contextlib.suppress(OSError):
                os.unlink(self._unix_path)  # noqa: PTH108
        self._close()

    def _close(self) -> None:
        for one in self._sockets:
            one.close()
        self._sockets = []

    def _listen_tcp(self, inherited: list[socket.socket]) -> None:
        absent: OSError | None = None
        found = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                if not self._adopt(inherited, family, address):
                    self._listen(family, address)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = error
        if not self._sockets and absent is not None:
            raise absent

    def _listen_unix(self, inherited: list[socket.socket]) -> None:
        if Path(self._unix_path).exists() and self._adopt(inherited, socket.AF_UNIX, self._unix_path):
            return
        Path(self._unix_path).unlink(missing_ok=True)  # of an agent that was killed
        self._listen(socket.AF_UNIX, self._unix_path)

    def _adopt(self, inherited: list[socket.socket], family: int, address: Any) -> bool:
        """Take a socket that listens at an address already, where there is one."""
        for one in inherited:
            if one.family == family and _same_place(one.getsockname(), address):
                inherited.remove(one)
                self._sockets.append(one)
                return True
        return False

    def _listen(self, family: int, address: Any) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        self._sockets.append(sock)


def _same_place(bound: Any, wanted: Any) -> bool:
    """Whether a socket is bound where one is wanted; port 0 wants any."""
    if isinstance(wanted, str):
        return bool(bound == wanted)
    return bool(bound[0] == wanted[0] and wanted[1] in {0, bound[1]})
