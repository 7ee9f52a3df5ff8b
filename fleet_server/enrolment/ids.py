"""Names of devices, and those that none may have: the server's own, and that of who listens to alerts."""

from __future__ import annotations

from agent.protocol.topics import check_device_id
from fleet_server.errors import InvalidError

SERVER_NAME = "shoal-server"
LISTENER_NAME = "shoal-alerts"  # who may listen to alerts of every fleet, and to nothing else


def server_name(number: int) -> str:
    """What a server is called at the broker, by its number among those of its database."""
    return SERVER_NAME if number == 1 else f"{SERVER_NAME}-{number}"


def usable_id(device_id: str) -> str:
    """Return the id unchanged.

    Raises:
        InvalidError: when no device may have it: it does not fit topics, or would pass for the server or a listener.
    """
    try:
        check_device_id(device_id)
    except ValueError as error:
        raise InvalidError("bad_device_id", f"device_id: {error}", field="device_id") from None
    own = next((name for name in (SERVER_NAME, LISTENER_NAME) if device_id.lower().startswith(name)), None)
    if own is not None:
        detail = f"device_id: names that begin with {own!r} are the server's own: take another"
        raise InvalidError("reserved_device_id", detail, field="device_id")
    return device_id
