"""Latency sketches and confusion counts as bytes of a row: MessagePack of the same shapes as on the wire. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

Cell = tuple[int, int, int]  # label, predicted, count
_LATENCY = msgspec.msgpack.Decoder(dict[int, int])
_CELLS = msgspec.msgpack.Decoder(list[Cell])
_ENCODER = msgspec.msgpack.Encoder()


def pack_latency(buckets: Mapping[int, int]) -> bytes:
    """A histogram (`agent.protocol.histogram`) as bytes; nothing for an empty one."""
    return _ENCODER.encode(buckets) if buckets else b""


def unpack_latency(packed: bytes) -> dict[int, int]:
    """What `pack_latency` packed."""
    return _LATENCY.decode(packed) if packed else {}


def pack_cells(cells: Iterable[Cell]) -> bytes:
    """Confusion cells as bytes; nothing for none."""
    found = list(cells)
    return _ENCODER.encode(found) if found else b""


def unpack_cells(packed: bytes) -> list[Cell]:
    """What `pack_cells` packed."""
    return _CELLS.decode(packed) if packed else []
