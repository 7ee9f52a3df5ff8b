"""Where else contents may come from, as the configuration says: tables `[sources]`, `[peers]` and `[bundles]`."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.errors import ConfigError
from agent.protocol.topics import check_device_id
from agent.tables import Table

LONGEST_DAYS = 3650.0
TABLES = ("sources", "peers", "bundles")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class SourceKind(StrEnum):
    """What a source is."""

    USB = "usb"
    PEER = "peer"
    MQTT = "mqtt"
    MIRROR = "mirror"
    HTTPS = "https"


DEFAULT_ORDER = tuple(SourceKind)


@dataclass(frozen=True)
class SourceConfig:
    """Other sources than the broker.

    Attributes:
        order: which kind is asked first; MQTT is always among them.
        mirrors: `https://…/{digest}`: any static server with ranges.
        peers: `host:port` of devices on the LAN that serve artifacts.
        serve: whether this device serves the artifacts it has to its peers.
        listen: `host:port` to serve at.
        mdns: find peers by mDNS, and be found.
        rate_mb_s: of everything served to peers, in MB a second.
        insecure_plain_http: peers and mirrors without TLS, also beyond this machine.
        folder: where sticks with bundles are mounted; empty for none.
        offline: run what the signed order of a bundle says, though no server did.
        bundle: the order that this device follows, of those that the fleet has signed.
        profile: of this device, to pick from an order for several; empty for the one of what it ran before.
        days: how long the metadata in a bundle counts after it has expired, in days.
    """

    order: tuple[SourceKind, ...] = DEFAULT_ORDER
    mirrors: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    serve: bool = False
    listen: str = "127.0.0.1:8472"
    mdns: bool = False
    rate_mb_s: float = 20.0
    insecure_plain_http: bool = False
    folder: str = ""
    offline: bool = False
    bundle: str = "default"
    profile: str = ""
    days: float = 90.0


def read_sources(values: Mapping[str, Any]) -> SourceConfig:
    """Read the three tables.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    sources, peers, bundles = (Table(name, values.get(name, {})) for name in TABLES)
    insecure = peers.flag("insecure_plain_http")
    found = SourceConfig(
        order=_order(sources.texts("order")),
        mirrors=tuple(_mirror(one, insecure=insecure) for one in sources.texts("mirrors")),
        peers=tuple(_place("peers.at", one) for one in peers.texts("at")),
        serve=peers.flag("serve"),
        listen=_place("peers.listen", peers.text("listen", SourceConfig.listen)),
        mdns=peers.flag("mdns"),
        rate_mb_s=peers.number("rate_mb_s", SourceConfig.rate_mb_s, 1000.0),
        insecure_plain_http=insecure,
        folder=bundles.text("folder", ""),
        offline=bundles.flag("offline"),
        bundle=_name(bundles.text("name", SourceConfig.bundle)),
        profile=bundles.text("profile", ""),
        days=bundles.number("days", SourceConfig.days, LONGEST_DAYS),
    )
    for table in (sources, peers, bundles):
        table.refuse_rest()
    if found.folder and not Path(found.folder).is_absolute():
        raise ConfigError(f"bundles.folder: {found.folder!r} is no absolute path, such as /media/shoal")
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_place(place: str) -> tuple[str, int]:
    """Host and port of `host:port`, with an IPv6 address in brackets."""
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)


def _order(given: list[str]) -> tuple[SourceKind, ...]:
    """MQTT last, where it is not named: it is always there."""
    try:
        order = tuple(SourceKind(one) for one in given) or DEFAULT_ORDER
    except ValueError:
        raise ConfigError(f"sources.order: {given} may hold {', '.join(SourceKind)}") from None
    if len(set(order)) != len(order):
        raise ConfigError(f"sources.order: {given} names a kind twice")
    return order if SourceKind.MQTT in order else (*order, SourceKind.MQTT)


def _mirror(url: str, *, insecure: bool) -> str:
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (parts.scheme == "http" and (insecure or is_loopback(parts.hostname or "")))
        usable = secure and bool(parts.hostname) and parts.port != 0 and not parts.username
    except ValueError:
        usable = False
    if not usable or url.count("{digest}") != 1 or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(
            f"sources.mirrors: {url[:200]!r} is not like https://mirror.example/{{digest}} (http:// only to this "
            "machine, or with peers.insecure_plain_http)"
        )
    return url


def _place(key: str, value: str) -> str:
    host, _, port = value.rpartition(":")
    bare = not host.startswith("[") or host.endswith("]")
    if not host or not bare or not (port.isascii() and port.isdigit()) or not 0 < int(port[:9]) <= 65535:
        raise ConfigError(f"{key}: {value!r} is not host:port, such as 10.0.0.7:8472")
    return value


def _name(value: str) -> str:
    try:
        return check_device_id(value)  # the same characters: it stands in a path
    except ValueError:
        raise ConfigError(f"bundles.name: {value!r} is not 1 to 64 letters, digits, '.', '_' or '-'") from None
