"""One POST to an address that a person gave: within bounds of time and bytes, and never into the server's own network.

The name is resolved here and the connection made to the address that was checked, so that a name can't mean another
address a moment later. Redirects are not followed: they could lead anywhere.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

from fleet_server.clock import utc_now
from fleet_server.webhooks.schedule import Outcome, retry_after

TIMEOUT_S = 10.0  # of everything after the name is known
CONNECT_S = 5.0
READ_BYTES = 4096  # of an answer's body; the rest is nobody's concern
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RefusedAddressError(Exception):
    """The address is none to send to: says why, and what would do."""


def check_url(url: str, *, allow_private: bool) -> SplitResult:
    """The parts of a webhook's URL.

    Raises:
        ValueError: where it is none, or, unless private addresses are allowed, not `https://` or of a bare address
            that is not public.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and parts.scheme in {"https", "http"}
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(one <= " " or one == "\x7f" for one in url):
        raise ValueError("it is not https://host/path")
    if parts.scheme != "https" and not allow_private:
        raise ValueError("it is not https://: what is sent could be read on its way (SHOAL_WEBHOOK_ALLOW_PRIVATE)")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("it holds a user or a fragment, which are not sent: leave them out")
    if not allow_private:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(parts.hostname or "")
            if not is_public(address):
                raise RefusedAddressError(_private(str(address)))
    return parts


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def post(url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool) -> Outcome:
    """Send; whatever goes wrong is an outcome too."""
    try:
        parts = check_url(url, allow_private=allow_private)
        addresses = _resolve(parts, allow_private=allow_private)
    except (ValueError, RefusedAddressError) as error:
        return Outcome(None, str(error))
    except OSError as error:
        return Outcome(None, f"its name is not known: {error}")
    try:
        with _deadline(_connect(addresses)) as connection:
            return _exchange(connection, parts, headers, body)
    except (OSError, http.client.HTTPException) as error:
        return Outcome(None, f"no answer within {TIMEOUT_S:.0f} s: {str(error) or type(error).__name__}"[:500])


def _private(address: str) -> str:
    return f"{address} is not an address of the public internet (SHOAL_WEBHOOK_ALLOW_PRIVATE)"


def _resolve(parts: SplitResult, *, allow_private: bool) -> list[tuple[str, int]]:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [(str(one[4][0]), port) for one in found]
    good = [one for one in addresses if allow_private or is_public(ipaddress.ip_address(one[0].partition("%")[0]))]
    if not good:
        raise RefusedAddressError(_private(addresses[0][0]))
    return good


def _connect(addresses: list[tuple[str, int]]) -> socket.socket:
    error: OSError | None = None
    for one in addresses[:2]:
        try:
            return socket.create_connection(one, CONNECT_S)
        except OSError as failed:
            error = failed
    raise error or OSError("it has no address")


@contextlib.contextmanager
def _deadline(connection: socket.socket) -> Iterator[socket.socket]:
    """Ends a connection that takes too long, however little by little it goes on.

    Raises:
        TimeoutError: when it did: whatever was read until then is not whole.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield connection
    finally:
        timer.cancel()
        connection.close()
        if late.is_set():
            raise TimeoutError("it took too long")


def _exchange(
    connection: socket.socket, parts: SplitResult, headers: Mapping[str, str], body: bytes
) -> Outcome:  # fmt: skip
    connection.settimeout(TIMEOUT_S)
    host = parts.hostname or ""
    spoken = http.client.HTTPConnection(host, parts.port)
    secure = parts.scheme == "https"
    spoken.sock = ssl.create_default_context().wrap_socket(connection, server_hostname=host) if secure else connection
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        spoken.request("POST", target, body, {**headers, "Host": parts.netloc, "Connection": "close"})
        answer = spoken.getresponse()
        said = answer.read(READ_BYTES).decode(errors="replace").replace("\0", "")
        wait = retry_after(answer.headers.get("Retry-After"), utc_now())
        moved = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        return Outcome(answer.status, f"{answer.status} {answer.reason}{moved}: {said[:300]}".rstrip(": "), wait)
    finally:
        spoken.close()
