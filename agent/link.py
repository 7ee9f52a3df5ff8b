"""Finds out what kind of link the device's default route goes by. It reads the kernel's tables, and sends nothing."""

from __future__ import annotations

from pathlib import Path

from agent.protocol.delivery import LinkType
from agent.protocol.facts import LinkFacts

ROUTES = "proc/net/route"
ROUTES_6 = "proc/net/ipv6_route"
INTERFACES = "sys/class/net"
MODEMS = ("wwan", "ppp", "rmnet", "usb_modem", "cdc-wdm")


def detect_link(kind: str = "", metered: bool | None = None, root: Path = Path("/")) -> LinkFacts:  # noqa: FBT001
    """What the configuration says, else what the kernel does.

    Args:
        kind: one of `LinkType`; empty to find out.
        metered: whether it costs by the byte; None: cellular does.
        root: of the file system.
    """
    interface = "" if kind else default_interface(root)
    found = LinkType(kind) if kind else (_type_of(interface, root) if interface else LinkType.UNKNOWN)
    return LinkFacts(found.value, found is LinkType.CELLULAR if metered is None else metered, interface)


def default_interface(root: Path) -> str:
    """The interface of the default route with the lowest metric, of IPv4 else of IPv6; empty when there is none."""
    found = []
    for line in _read(root / ROUTES).splitlines()[1:]:
        words = line.split()
        if len(words) >= 8 and words[1] == "00000000" and words[7] == "00000000" and _is_up(words[3]):
            found.append((int(words[6]), words[0]))
    if not found:
        for line in _read(root / ROUTES_6).splitlines():
            words = line.split()
            if len(words) >= 10 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
                found.append((int(words[5], 16), words[9]))
    return min(found)[1] if found else ""


def _is_up(flags: str) -> bool:
    return bool(int(flags, 16) & 1)


def _type_of(interface: str, root: Path) -> LinkType:
    folder = root / INTERFACES / interface
    uevent = _read(folder / "uevent")
    if "DEVTYPE=wwan" in uevent or interface.startswith(MODEMS):
        return LinkType.CELLULAR
    if "DEVTYPE=wlan" in uevent or (folder / "wireless").exists() or (folder / "phy80211").exists():
        return LinkType.WIFI
    return LinkType.ETHERNET if _read(folder / "type").strip() == "1" else LinkType.UNKNOWN


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
