"""How an artifact may travel: the names of codecs, and the bytes of a difference. Standard library only.

A difference (`delta-1`) is one zstd frame of operations, each a head of `HEAD` and its payload. Together, in order, they
make the target's bytes. An operation may take bytes of the base: they begin where those of the one before ended, plus
`skip`. Elements are little-endian integers of `width` bytes, whatever the model means by them. A payload of elements is
split into planes: the lowest bytes of all elements, then the next ones. Differences are modulo 2^(8·width), zigzag coded
(0, -1, 1, -2, …), so that small ones of either sign have zeros in their upper planes.

| operation | takes of the base | payload |
|---|---|---|
| `COPY` | `length` bytes | none |
| `LITERAL` | nothing | `length` bytes in planes |
| `ADD` | `length` bytes | what is added to each element, in planes |
| `SPARSE` | `length` bytes | `gaps` bytes: how many elements stay before one that changes, 255 for 255 that stay and none that changes; then what is added to the `changes` elements, in planes |
"""  # noqa: E501 (a row of a table)

from __future__ import annotations

import struct

ZSTD = "zstd"  # the artifact as one zstd frame; it has no base
DELTA = "delta-1"

COPY, LITERAL, ADD, SPARSE = range(4)
HEAD = struct.Struct("<BBIIIq")  # operation, width, length, changes, gaps, skip
WIDTHS = frozenset({1, 2, 4, 8})
BLOCK = 256 * 1024  # bytes of a LITERAL or an ADD at most
CHANGES = 64 * 1024  # elements that a SPARSE changes at most
GAPS = 128 * 1024  # bytes of its gaps at most
NO_CHANGE = 255
WINDOW_LOG = 21  # of zstd frames: a device keeps 2^WINDOW_LOG bytes while it decodes


def most_operations(size: int) -> int:
    """How many operations a difference may have that makes `size` bytes: a bound on what a device works."""
    return 4096 + size // 32
