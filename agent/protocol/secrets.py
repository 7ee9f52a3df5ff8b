"""What secrets look like in a line of text, so that neither side ever logs one.

The last net, not the first: nothing logs a secret on purpose. It catches addresses with passwords in the errors of
libraries, and headers in what somebody logs while looking for a fault.
"""

from __future__ import annotations

import logging
import re

HIDDEN = "…"
_NAMES = "password|passwd|secret|token|pin-value"
_SHOWN = rf"\g<kept>{HIDDEN}"
_SECRETS = (
    # user:password@ of an address; the user may stay
    (re.compile(r"(?P<kept>[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)", re.IGNORECASE), _SHOWN),
    # a header's or an option's value
    (re.compile(r"(?P<kept>\b(?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE), _SHOWN),
    (re.compile(rf"(?P<kept>\b(?:{_NAMES})[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}}]{{4,}}", re.IGNORECASE), _SHOWN),
    # Shoal's own tokens: the public part may stay
    (re.compile(r"(?P<kept>\bshoal[a-z0-9]*[_.][A-Za-z0-9-]+[_.])[A-Za-z0-9_.~-]{16,}"), _SHOWN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)


def hide_secrets(text: str) -> str:
    """The text with `…` in the place of whatever looks like a secret."""
    for pattern, kept in _SECRETS:
        text = pattern.sub(kept, text)
    return text


class HidingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return hide_secrets(super().format(record))
