"""The API's description, as a server gives it: made once in each process, for it takes seconds. Nobody changes it."""

from __future__ import annotations

import functools
from typing import Any

from fleet_server.app import create_app
from fleet_server.settings import Settings


@functools.cache
def document() -> dict[str, Any]:
    """Of a server with the default settings."""
    return create_app(Settings()).openapi()
