"""Download tickets: a device may fetch one content over HTTP for a while. Pure, and kept nowhere.

A ticket is a claim with a MAC (HMAC-SHA-256, RFC 2104) under a secret that follows from the CA's key: every server of
a database takes the tickets of the others, and a new CA ends them all.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

import msgspec

from fleet_server.errors import UnauthorizedError
from fleet_server.trust.ca import FleetCa

LIFETIME_S = 900.0
TICKET_CHARS = 1024


class Ticket(msgspec.Struct, frozen=True):
    """Who may fetch what until when.

    Attributes:
        device_id: for whom it was made.
        digest: of the content.
        size: its bytes.
        expires_at: Unix seconds.
    """

    device_id: str
    digest: str
    size: int
    expires_at: float


class TicketDesk:
    """Makes and reads tickets.

    Args:
        ca: whose key the secret follows from.
    """

    def __init__(self, ca: FleetCa) -> None:
        self._secret = ca.derive_secret("download tickets")

    def issue(self, device_id: str, digest: str, size: int, now: float) -> str:
        """A ticket as text, for `LIFETIME_S`."""
        claim = msgspec.json.encode(Ticket(device_id, digest, size, now + LIFETIME_S))
        return f"{_text(claim)}.{_text(self._mac(claim))}"

    def read(self, text: str, digest: str, now: float) -> Ticket:
        """What a ticket says, when it is one of ours for a content, and holds.

        Raises:
            UnauthorizedError: when it is not.
        """
        first, _, second = text[:TICKET_CHARS].partition(".")
        try:
            claim, mac = (base64.b64decode(_padded(part), altchars=b"-_", validate=True) for part in (first, second))
        except (ValueError, binascii.Error):
            claim, mac = b"", b""
        if not hmac.compare_digest(mac, self._mac(claim)):
            raise _refused("it is no ticket of this server")
        ticket = msgspec.json.decode(claim, type=Ticket)
        if ticket.digest != digest:
            raise _refused("it is for another artifact")
        if not now < ticket.expires_at:
            raise _refused("it has expired")
        return ticket

    def _mac(self, claim: bytes) -> bytes:
        return hmac.new(self._secret, claim, hashlib.sha256).digest()


def _refused(why: str) -> UnauthorizedError:
    return UnauthorizedError("bad_ticket", f"the download ticket does not count: {why}; devices ask for one over MQTT")


def _padded(text: str) -> str:
    return text + "=" * (-len(text) % 4)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
