"""Whether devices of a LAN answer requests in each other's place, as the configuration says: table `[balancing]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.addresses import check_place
from agent.errors import ConfigError
from agent.forwarding import is_of_lan
from agent.protocol.limits import LIMITS
from agent.protocol.topics import check_device_id
from agent.tables import Table

MOST_TRIES = 8


@dataclass(frozen=True)
class BalancingConfig:
    """What the device's owner allows.

    Attributes:
        forward: whether peers are asked in this device's place, where a model of it has as many requests as may wait.
        serve: whether this device answers requests that peers forward.
        listen: `host:port` at which it does.
        address: `host:port` at which peers reach that, in numbers; empty for `listen`.
        at: peers, by `host:port`, beside those that mDNS finds and the server lists.
        devices: whose requests are answered; empty for every device of the fleet.
        lan: its name: the server tells devices that name the same one of each other. Empty for no list.
        tries: how many peers are asked for one request.
        any_variant: whether a peer may answer with another variant of the same version, whose answers may differ.
    """

    forward: bool = False
    serve: bool = False
    listen: str = "127.0.0.1:8473"
    address: str = ""
    at: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    lan: str = ""
    tries: int = 2
    any_variant: bool = False

    @property
    def on(self) -> bool:
        """Whether there is anything to do."""
        return self.forward or self.serve

    @property
    def reached_at(self) -> str:
        """Where peers reach this device, to be told to them; empty where it answers nobody, or that is not known."""
        listens = self.listen if is_of_lan(self.listen) else ""
        return (self.address or listens) if self.serve else ""


def read_balancing(values: Any) -> BalancingConfig:
    """Read the table.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    table = Table("balancing", values)
    listen = check_place("balancing.listen", table.text("listen", BalancingConfig.listen))
    address = table.text("address", "")
    if address and not is_of_lan(check_place("balancing.address", address)):
        raise ConfigError("balancing.address: name an address of the LAN in numbers, such as 192.168.1.7:8473")
    found = BalancingConfig(
        forward=table.flag("forward"),
        serve=table.flag("serve"),
        listen=listen,
        address=address,
        at=tuple(check_place("balancing.at", one) for one in table.texts("at")),
        devices=tuple(map(_device, table.texts("devices", LIMITS.facts_entries))),
        lan=table.text("lan", ""),
        tries=table.whole("tries", BalancingConfig.tries, MOST_TRIES),
        any_variant=table.flag("any_variant"),
    )
    table.refuse_rest()
    if len(found.lan) > LIMITS.name_chars:
        raise ConfigError(f"balancing.lan: the name of a LAN has at most {LIMITS.name_chars} characters")
    if found.lan and found.serve and not found.reached_at:
        raise ConfigError(
            f"balancing.address: with listen = {listen!r} the server can't tell others where this device is: name its "
            "address, such as 192.168.1.7:8473"
        )
    return found


def _device(name: str) -> str:
    try:
        return check_device_id(name)
    except ValueError as error:
        raise ConfigError(f"balancing.devices: {error}") from None
