"""Which peers may be asked in this device's place, and ask it: gathered here, told to the worker, which does the rest.

Peers come from the configuration, from mDNS and from the server's list. What these say is only where to ask: who a
peer is, TLS proves. Owned by the supervisor's main thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from agent.balancing_config import BalancingConfig
from agent.config import Config
from agent.errors import IdentityError
from agent.forwarding import is_of_lan
from agent.identity import identity_folder, load_identity
from agent.protocol.limits import LIMITS
from agent.serving.ipc import PeerTrust, TellPeers
from agent.source_config import is_loopback, split_place
from agent.update.source_tls import Credentials

log = logging.getLogger("agent.balancing")
RENEW_S = 60.0
FOUND = 32  # by mDNS
NOT_ENROLLED = (
    "balancing: nothing is forwarded or taken, for this device has no certificate of a fleet: enrol it (shoal-agent "
    "enroll), or set peers.insecure_plain_http, and whoever is on the network may ask"
)


def takes_peers(config: Config) -> bool:
    """Whether there is to be a socket for peers' requests: not where nobody could tell who they are."""
    if not config.balancing.serve:
        return False
    try:
        identity = load_identity(identity_folder(config.state_dir))
    except IdentityError:
        return False  # who connects to the broker says so
    return (identity is not None and bool(identity.certificate)) or _may_be_plain(config, config.balancing.listen)


def _may_be_plain(config: Config, place: str) -> bool:
    return config.sources.insecure_plain_http or is_loopback(split_place(place)[0])


class Balancing:
    """What the worker is told of peers.

    Args:
        config: of the agent.
        credentials: of the device.
        own_place: gives where this device takes requests of peers; None where it does not.
        tell: tells the worker; false when it is gone.
    """

    def __init__(
        self,
        config: Config,
        credentials: Credentials,
        own_place: Callable[[], str | None],
        tell: Callable[[TellPeers], bool],
    ) -> None:
        self._config = config
        self._credentials = credentials
        self._own_place = own_place
        self._tell = tell
        self._found: dict[str, str] = {}
        self._listed: tuple[str, ...] = ()
        self._told: TellPeers | None = None
        self._is_ready = False
        self._renew_at = 0.0
        if self._wanted.on and self._trust() is None and not config.sources.insecure_plain_http:
            log.log(logging.WARNING if _is_near(self._wanted) else logging.ERROR, NOT_ENROLLED)

    @property
    def _wanted(self) -> BalancingConfig:
        return self._config.balancing

    def found(self, name: str, place: str | None) -> None:
        """A peer was found on the LAN at `host:port`, or has gone."""
        if place is None:
            self._found.pop(name, None)
        elif name in self._found or len(self._found) < FOUND:
            self._found[name] = place
        self._say()

    def listed(self, places: Iterable[str]) -> None:
        """The server's list, which replaces the one before."""
        self._listed = tuple(place for place in places if is_of_lan(place))[: LIMITS.peers]
        self._say()

    def worker_ready(self) -> None:
        """There is a new worker, which knows nothing."""
        self._is_ready, self._told = True, None
        self._say()

    def worker_ended(self) -> None:
        """There is none."""
        self._is_ready = False

    def tick(self, now: float) -> None:
        """Take over a renewed certificate."""
        if now >= self._renew_at:
            self._renew_at = now + RENEW_S
            self._say()

    def _say(self) -> None:
        if not (self._wanted.on and self._is_ready):
            return
        message = self._message()
        if message != self._told and self._tell(message):
            self._told = message

    def _message(self) -> TellPeers:
        trust, own = self._trust(), self._own_place()
        every = dict.fromkeys((*self._wanted.at, *self._listed, *self._found.values()))
        mine = {own, self._wanted.reached_at, self._wanted.listen}
        peers = [one for one in every if one not in mine and (trust is not None or _may_be_plain(self._config, one))]
        return TellPeers(
            peers=tuple(peers[: LIMITS.peers]) if self._wanted.forward else (),
            serve=self._wanted.serve,
            trust=trust,
            devices=self._wanted.devices,
            tries=self._wanted.tries,
            any_variant=self._wanted.any_variant,
        )

    def _trust(self) -> PeerTrust | None:
        try:
            return self._credentials.for_worker()
        except IdentityError as error:
            log.error("balancing: %s", error)  # noqa: TRY400 (its message says it all)
            return None


def _is_near(wanted: BalancingConfig) -> bool:
    """Whether all that is configured is this machine, where plain HTTP will do."""
    return all(is_loopback(split_place(one)[0]) for one in (*wanted.at, *((wanted.listen,) if wanted.serve else ())))
