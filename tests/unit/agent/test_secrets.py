"""No secret reaches a log, whichever way it got into the text."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from agent.protocol.secrets import HidingFormatter, hide_secrets

SECRET = "Zm9vYmFyYmF6cXV4LXRoaXMtaXMtc2VjcmV0"


@pytest.mark.parametrize(
    "text",
    [
        f"mqtts://agent:{SECRET}@10.0.0.5:8883 does not answer",
        f"postgresql+psycopg://shoal:{SECRET}@db/shoal",
        f"{{'authorization': 'Bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}=",
        f'{{"name": "ann", "password": "{SECRET}"}}',
        f"token={SECRET}&x=1",
        f"pkcs11:token=shoal;object=key?pin-value={SECRET}",
        f"shoal_0192ab_{SECRET}",
        f"shoal1.0192ab.{SECRET}",
        f"-----BEGIN EC PRIVATE KEY-----\n{SECRET}\n-----END EC PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    assert SECRET not in hide_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "device camera-01 is at mqtts://10.0.0.5:8883, shard 12",
        "https://shoal.example/api/v1/devices?cursor=abc answered 404",
        "artifact 3fc387351ff9e7eb41bd3f8c5e1ab707c4f3e817 verified in 0.2 s",
        "the token has expired: make another one",
        "shoal_server started",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


def test_a_traceback_is_a_line_too() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(HidingFormatter("%(message)s"))
    try:
        int(f"mqtt://me:{SECRET}@host")
    except ValueError:
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "failed: %s", (f"Bearer {SECRET}",), sys.exc_info()))
    assert "invalid literal" in out.getvalue()
    assert SECRET not in out.getvalue()
