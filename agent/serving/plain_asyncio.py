"""Imports asyncio without TLS, which most workers have no use for: they serve this machine alone.

OpenSSL's libraries would cost each start several milliseconds, and the process two megabytes for as long as it lives.
Whoever imports `ssl` afterwards has it; only asyncio's own connections are without, until `with_tls`.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

if "asyncio" not in sys.modules and "ssl" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # not to be imported, which asyncio copes with
    try:
        import asyncio  # noqa: F401 (for what else imports it)
    finally:
        del sys.modules["ssl"]


def with_tls() -> None:
    """Give asyncio's connections TLS after all; an event loop that runs already has it too."""
    import ssl
    from asyncio import base_events, selector_events, sslproto

    modules: list[Any] = [base_events, selector_events]
    if modules[0].ssl is None:
        for one in modules:
            one.ssl = ssl
        importlib.reload(sslproto)  # whose classes nobody has made anything of
