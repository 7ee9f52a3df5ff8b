"""With which certificates a device reaches mirrors, the fleet server and its peers, and serves peers.

A peer proves by its device certificate that it is of the fleet: the certificate holds the DNS name that every device's
has and no host's, so a host name is checked as ever, and no device can pass for a server.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from collections.abc import Callable

from agent.config import Config
from agent.errors import IdentityError
from agent.identity import Identity, chain_file, identity_folder, load_identity, load_into
from agent.peers.certificates import organization_of
from agent.serving.ipc import PeerTrust

log = logging.getLogger("agent.sources")


class Credentials:
    """TLS contexts of the device's identity as it is now; made anew when it was renewed. Of the main thread only.

    Args:
        config: where the identity lies, and `ca_file`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = identity_folder(config.state_dir)
        self._made: dict[str, tuple[str, ssl.SSLContext]] = {}

    @property
    def fleet(self) -> str:
        """Of the identity; empty where there is none."""
        identity = self._identity()
        return identity.fleet if identity else ""

    def downloads(self) -> ssl.SSLContext:
        """For mirrors and the fleet server: the system's certificates and the fleet's CA are believed."""
        return self._context("downloads", self._for_downloads)

    def to_peers(self) -> ssl.SSLContext | None:
        """For peers: the fleet's CA alone is believed; None where the device has no certificate of it."""
        identity = self._identity()
        return self._context("to_peers", self._for_peers) if identity and identity.certificate else None

    def of_peers(self) -> ssl.SSLContext | None:
        """To serve peers; None where the device has no certificate."""
        identity = self._identity()
        if identity is None or not identity.certificate:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        load_into(context, self._folder, identity)
        return context

    def for_worker(self) -> PeerTrust | None:
        """The same for another process of this device, which reads the files; None where there is no certificate.

        Raises:
            IdentityError: when they can't be used.
        """
        identity = self._identity()
        if identity is None or not identity.certificate:
            return None
        self.to_peers()  # writes the file, and finds out whether it can be used
        digest = hashlib.sha256(identity.certificate.encode()).hexdigest()
        return PeerTrust(str(chain_file(self._folder)), digest, identity.ca, identity.fleet)

    def _identity(self) -> Identity | None:
        try:
            return load_identity(self._folder)
        except IdentityError as error:
            log.error("%s", error)  # noqa: TRY400 (its message says it all)
            return None

    def _context(self, name: str, make: Callable[[Identity | None], ssl.SSLContext]) -> ssl.SSLContext:
        identity = self._identity()
        state = identity.certificate if identity else ""
        known = self._made.get(name)
        if known is None or known[0] != state:
            known = self._made[name] = (state, make(identity))
        return known[1]

    def _for_downloads(self, identity: Identity | None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._config.ca_file:
            context.load_verify_locations(self._config.ca_file)
        if identity is not None and identity.certificate:
            try:
                load_into(context, self._folder, identity)
            except IdentityError as error:  # a key in a token that OpenSSL does not reach: go without
                log.warning("downloads go without this device's certificate: %s", error)
                context = ssl.create_default_context(cadata=identity.ca)
                context.load_default_certs()
        return context

    def _for_peers(self, identity: Identity | None) -> ssl.SSLContext:
        assert identity is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        load_into(context, self._folder, identity)
        return context


def organization(sock: ssl.SSLSocket) -> str:
    """The fleet that the other side's certificate names; empty when it names none."""
    return organization_of(sock.getpeercert())
