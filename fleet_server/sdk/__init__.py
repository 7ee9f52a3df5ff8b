"""Python client of the REST API: `from fleet_server.sdk import Client`."""

from fleet_server.sdk.client import Client, segment
from fleet_server.sdk.errors import ApiError, AuthError, ConflictError, NotFoundError, UnreachableError

__all__ = ["ApiError", "AuthError", "Client", "ConflictError", "NotFoundError", "UnreachableError", "segment"]
