"""What a window says beyond counts, as bytes of a row: MessagePack by the names of `ModelWindow`'s fields. Pure.

Beside them are how much memory the agent had and how hot the device was when the window ended, so that whoever judges
windows need not look for the device's own.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agent.protocol.messages import HostWindow, ModelWindow

FIELDS = ("confidence", "predicted", "inputs", "outputs", "crashes", "shadowed", "compared", "disagreed", "dropped")
HOST = ("agent_rss_mb", "temperature_c")
_DECODER = msgspec.msgpack.Decoder(dict[str, Any])
_ENCODER = msgspec.msgpack.Encoder()


def pack_signals(model: ModelWindow, host: HostWindow) -> bytes | None:
    """Those fields that say something; None when none does."""
    found = {name: value for name in FIELDS if (value := getattr(model, name))}
    found |= {name: value for name in HOST if (value := getattr(host, name)) is not None}
    return _ENCODER.encode(found) if found else None


def unpack_signals(packed: bytes | None) -> dict[str, Any]:
    """What `pack_signals` packed; sketches as plain mappings."""
    return _DECODER.decode(packed) if packed else {}
