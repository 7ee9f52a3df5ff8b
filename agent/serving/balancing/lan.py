"""This worker's part in its LAN: requests that it gives to peers, and those that it takes from them.

Imported where the agent's configuration wants it, and not before: it needs TLS, which most workers do without.
"""

from __future__ import annotations

import logging
import socket
import ssl

from agent.serving.balancing.answering import PeerApi
from agent.serving.balancing.forwarding import Forwarding, Rules
from agent.serving.balancing.links import PeerTls
from agent.serving.balancing.listening import CONNECTIONS, HANDSHAKES, Guests, PeerListener
from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.exchange import BODY_LIMIT
from agent.serving.inferring import Inferring
from agent.serving.ipc import PeerTrust, TellPeers
from agent.serving.plain_asyncio import with_tls
from agent.serving.registry import Registry

log = logging.getLogger("agent.balancing")


class Lan:
    """Both ways. Used by one event loop alone.

    Args:
        registry: what is loaded.
        inferring: answers, and is told whom to ask.
        buffers: that bodies arrive in.
        sockets: that listen for peers.

    Attributes:
        forwarding: to peers.
        api: what peers ask.
    """

    def __init__(
        self, registry: Registry, inferring: Inferring, buffers: Buffers, sockets: list[socket.socket]
    ) -> None:
        with_tls()
        self._inferring = inferring
        self.forwarding = Forwarding()
        self.api = PeerApi(registry, inferring, buffers, Clients(CONNECTIONS - HANDSHAKES, BODY_LIMIT))
        self._listener = PeerListener(sockets, self.api)

    def told(self, message: TellPeers) -> None:
        """Do so from now on; what can't be done is logged, and left."""
        try:
            asking = (
                None if message.trust is None else PeerTls(_context(message.trust, server=False), message.trust.fleet)
            )
            asked = (
                None if message.trust is None else PeerTls(_context(message.trust, server=True), message.trust.fleet)
            )
        except OSError as error:  # SSLError is one
            log.error("peers are neither asked nor answered: the device's certificate can't be used: %s", error)  # noqa: TRY400
            return
        self.forwarding.told(message.peers, asking, Rules(message.tries, message.any_variant))
        self._inferring.elsewhere = self.forwarding.answer if message.peers else None
        if message.serve:
            self._listener.told(Guests(asked, frozenset(message.devices)))

    def close(self) -> None:
        """Give nothing, and take nothing new."""
        self._inferring.elsewhere = None
        self.forwarding.close()
        self._listener.close()


def _context(trust: PeerTrust, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if server:
        context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=trust.ca)
    context.load_cert_chain(trust.chain)
    return context
