"""Peers found by mDNS (RFC 6762) and DNS-SD (RFC 6763), and this one made known. Needs the extra `lan` (zeroconf).

What the network says is only where to ask: who a peer is, TLS proves, and what it sends is verified.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.errors import ConfigError
from agent.source_config import is_loopback, split_place

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

log = logging.getLogger("agent.peers")
ARTIFACTS = "_shoal-peer._tcp.local."  # served to peers
INFERENCE = "_shoal-infer._tcp.local."  # requests of peers are answered
MISSING = "peers.mdns needs a library that is not installed: pip install 'shoal[lan]', or name peers in peers.at"
LOOK_UP_MS = 3000


@dataclass(frozen=True)
class Service:
    """What peers may offer.

    Attributes:
        kind: of it, as DNS-SD has it.
        found: takes a peer's name and its `host:port`, None when it has gone; called from another thread.
        listen: `host:port` at which this device offers it, with the real port; None where it does not.
    """

    kind: str
    found: Callable[[str, str | None], None]
    listen: str | None = None


class Neighbours:
    """Looks for peers, and makes this one known where it serves.

    Args:
        device_id: of this device: it does not find itself.
        services: that are looked for.

    Raises:
        ConfigError: when the library is missing.
    """

    def __init__(self, device_id: str, services: Sequence[Service]) -> None:
        try:
            from zeroconf import ServiceBrowser, Zeroconf
        except ImportError:
            raise ConfigError(MISSING) from None
        self._services = {one.kind: one for one in services}
        self._own = _label(device_id)
        try:
            self._zeroconf: Zeroconf = Zeroconf()
            for one in services:
                if one.listen is not None:
                    self._zeroconf.register_service(self._info(one.kind, one.listen))
            self._browser = ServiceBrowser(self._zeroconf, list(self._services), handlers=[self._changed])
        except OSError as error:
            raise ConfigError(f"peers.mdns: this machine's network does not do multicast: {error}") from None

    def stop(self) -> None:
        """Look no more, and say goodbye."""
        self._zeroconf.close()

    def _info(self, kind: str, listen: str) -> ServiceInfo:
        from zeroconf import ServiceInfo

        host, port = split_place(listen)
        return ServiceInfo(kind, f"{self._own}.{kind}", port=port, parsed_addresses=_addresses(host))

    def _changed(self, *, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        """A handler's parameters are named by the library."""
        from zeroconf import ServiceStateChange

        if name == f"{self._own}.{service_type}":
            return
        found = self._services[service_type].found
        if state_change is ServiceStateChange.Removed:
            found(name, None)
            return
        info = zeroconf.get_service_info(service_type, name, timeout=LOOK_UP_MS)
        place = usable_place(info.parsed_addresses(), info.port) if info else None
        if place is not None:
            log.info("found a peer at %s", place)
            found(name, place)


def usable_place(addresses: list[str], port: int | None) -> str | None:
    """Where a peer is, of what it says: on this network, never somewhere else."""
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        near = address.is_private and not address.is_link_local and not address.is_unspecified
        if near and isinstance(port, int) and 0 < port < 65536:
            return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    return None


def _label(device_id: str) -> str:
    """A device's name in mDNS: everybody hears it, so it is none that tells anything."""
    return "shoal-" + hashlib.sha256(device_id.encode()).hexdigest()[:12]


def _addresses(host: str) -> list[str]:
    """The addresses to be found at."""
    if host not in {"0.0.0.0", "::"}:  # noqa: S104
        return [host]
    import ifaddr

    every = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    return [one for one in every if not is_loopback(one)] or every
