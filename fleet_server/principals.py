"""Who acts: roles, the principal of a request, and what the audit log keeps of either. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_FLEET = "default"  # of everything, where nobody made another


class Role(StrEnum):
    """What a principal may do in a fleet; each role may do all that those before it may."""

    VIEWER = "viewer"  # reads
    OPERATOR = "operator"  # handles devices, profiles, models, variants and gate runs
    RELEASER = "releaser"  # also creates, approves and controls rollouts
    ADMIN = "admin"  # also manages users, tokens and the fleet

    def covers(self, least: Role) -> bool:
        """Whether this role may do what `least` may."""
        order = list(Role)
        return order.index(self) >= order.index(least)


@dataclass(frozen=True)
class Principal:
    """Who sent a request, and in which fleet they act.

    Attributes:
        id: stable and never used again, such as `user/0190…`; two that differ are two principals.
        name: for people, such as `user/ada`, `token/ci` or `admin`.
        role: in the fleet.
        fleet_id: the fleet that this request is about.
        server_wide: whether they may act in every fleet, and create fleets.
        token_id: of the token that they proved themselves with; None for the token of the settings.
    """

    id: str
    name: str
    role: Role
    fleet_id: str
    server_wide: bool = False
    token_id: str | None = None


@dataclass(frozen=True)
class Actor:
    """Who did something, and from where: a principal by one request.

    Attributes:
        name: of the principal.
        id: of the principal.
        address: the client's IP address.
        request_id: under which the server's log has the request.
    """

    name: str
    id: str
    address: str = ""
    request_id: str = ""

    def __str__(self) -> str:
        return self.name


# Devices and the server itself act too, by name alone.
Who = Actor | str


def id_of(who: Who) -> str:
    """The id of whoever acts: what two-person approval compares."""
    return who.id if isinstance(who, Actor) else who
