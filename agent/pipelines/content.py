"""What files and bytes of unknown origin are, as far as the inference API takes them. Pure."""

from __future__ import annotations

import os

from agent.serving.exchange import BODY_LIMIT

JSON = "application/json"


def content_type(data: bytes) -> str:
    """The media type by the first bytes: an image's, or JSON's; empty for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith(b"BM"):
        return "image/bmp"
    return JSON if data[:64].lstrip().startswith(b"{") else ""


def identity(found: os.stat_result) -> str:
    """What a file is, as long as nobody writes it anew."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


def refusal(data: bytes) -> str:
    """Why bytes can't even be asked about; empty when they can."""
    if len(data) > BODY_LIMIT:
        return f"it has more than {BODY_LIMIT >> 20} MiB"
    return "" if content_type(data) else "it is neither JPEG, PNG, WebP or BMP, nor JSON of the inference protocol"
