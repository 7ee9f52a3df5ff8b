"""Python client of the REST API: `from fleet_server.sdk import Client`."""

from fleet_server.sdk.client import Client, segment
from fleet_server.sdk.errors import ApiError, AuthError, ChangedError, ConflictError, NotFoundError, UnreachableError

__all__ = [
    "ApiError",
    "AuthError",
    "ChangedError",
    "Client",
    "ConflictError",
    "NotFoundError",
    "UnreachableError",
    "segment",
]
