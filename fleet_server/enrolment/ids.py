"""Names of devices, and the one that is the server's own."""

from __future__ import annotations

from agent.protocol.topics import check_device_id
from fleet_server.errors import InvalidError

SERVER_NAME = "shoal-server"


def usable_id(device_id: str) -> str:
    """Return the id unchanged.

    Raises:
        InvalidError: when no device may have it: it does not fit topics, or would pass for the server.
    """
    try:
        check_device_id(device_id)
    except ValueError as error:
        raise InvalidError("bad_device_id", f"device_id: {error}", field="device_id") from None
    if device_id.lower().startswith(SERVER_NAME):
        detail = f"device_id: names that begin with {SERVER_NAME!r} are the server's own: take another"
        raise InvalidError("reserved_device_id", detail, field="device_id")
    return device_id
