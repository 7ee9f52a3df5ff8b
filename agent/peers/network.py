"""This device's part in its LAN: whether it serves, and whom it finds. Owned by the supervisor's main thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.config import Config
from agent.errors import IdentityError
from agent.source_config import is_loopback, split_place
from agent.update.bundle_file import Held
from agent.update.source_tls import Credentials

if TYPE_CHECKING:
    from agent.peers.mdns import Neighbours
    from agent.peers.server import PeerServer

log = logging.getLogger("agent.peers")
RENEW_S = 60.0
NOT_ENROLLED = (
    "peers.serve: nothing is served, for this device has no certificate of a fleet: enrol it (shoal-agent enroll), or "
    "set peers.insecure_plain_http, and whoever is on the network reads the models"
)


class Lan:
    """Serves and finds peers, as far as the configuration says so.

    Args:
        config: of the agent.
        credentials: for mutual TLS.
        holds: where an artifact lies; called from other threads.
        found: takes peers that serve artifacts, as they come and go; called from another thread.
        found_inference: likewise, those that answer requests in another's place.
        inference_place: where this one does; None where it does not.

    Raises:
        AgentError: when the address can't be listened at, or mDNS is not installed.
    """

    def __init__(
        self,
        config: Config,
        credentials: Credentials,
        holds: Callable[[str], Held | None],
        found: Callable[[str, str | None], None],
        *,
        found_inference: Callable[[str, str | None], None],
        inference_place: str | None = None,
    ) -> None:
        self._credentials = credentials
        self._server: PeerServer | None = None
        self._neighbours: Neighbours | None = None
        self._renew_at = 0.0
        wanted = config.sources
        if wanted.serve:
            self._server = self._serve(config, holds)
        if wanted.mdns:
            from agent.peers.mdns import ARTIFACTS, INFERENCE, Neighbours, Service

            host = wanted.listen.rpartition(":")[0]
            listen = f"{host}:{self._server.port}" if self._server is not None else None
            services = [Service(ARTIFACTS, found, listen)]
            if config.balancing.on:
                services.append(Service(INFERENCE, found_inference, inference_place))
            self._neighbours = Neighbours(config.device_id, services)

    def _serve(self, config: Config, holds: Callable[[str], Held | None]) -> PeerServer | None:
        from agent.peers.server import PeerServer

        wanted = config.sources
        try:
            context = self._credentials.of_peers()
        except IdentityError as error:
            log.error("peers.serve: nothing is served: %s", error)  # noqa: TRY400 (its message says it all)
            return None
        plain = wanted.insecure_plain_http or is_loopback(split_place(wanted.listen)[0])
        if context is None and not plain:
            log.error(NOT_ENROLLED)
            return None
        if context is None:
            log.warning("INSECURE: artifacts are served at %s to everybody who reaches it", wanted.listen)
        server = PeerServer(wanted.listen, wanted.rate_mb_s, holds, context, self._credentials.fleet)
        log.info("artifacts are served to peers at port %d", server.port)
        return server

    def tick(self, now: float) -> None:
        """Take over a renewed certificate."""
        if self._server is None or self._server.context is None or now < self._renew_at:
            return
        self._renew_at = now + RENEW_S
        try:
            self._server.context = self._credentials.of_peers() or self._server.context
        except IdentityError as error:
            log.warning("%s", error)

    def stop(self) -> None:
        """Serve and look no more."""
        if self._neighbours is not None:
            self._neighbours.stop()
        if self._server is not None:
            self._server.stop()
