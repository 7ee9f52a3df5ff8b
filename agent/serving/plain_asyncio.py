"""Imports asyncio without TLS, which the worker has no use for: it serves this machine alone.

OpenSSL's libraries would cost each start several milliseconds, and the process two megabytes for as long as it lives.
Whoever imports `ssl` afterwards has it; only asyncio's own connections are without.
"""

from __future__ import annotations

import sys

if "asyncio" not in sys.modules and "ssl" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # not to be imported, which asyncio copes with
    try:
        import asyncio  # noqa: F401 (for what else imports it)
    finally:
        del sys.modules["ssl"]
