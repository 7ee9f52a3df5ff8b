"""How an artifact may travel: the names of codecs, and the bytes of a difference. Standard library only.

A difference (`delta-1`) is one zstd frame of operations, each a head of `HEAD` and its payload. In order, they make the
target's bytes. An operation may take bytes of the base: they begin where those of the one before ended, plus `skip`.
Elements are little-endian integers of `width` bytes, whatever the model means by them. A payload of elements is split
into planes: the lowest bytes of all elements, then the next ones. Sums are modulo 2^(8·width).

- `COPY` takes `length` bytes of the base, and has no payload.
- `LITERAL` takes nothing. Its payload is its `length` bytes in planes.
- `ADD` takes `length` bytes. Its payload is what is added to each element, zigzag coded (0, -1, 1, -2, … are 0, 1, 2,
  3, …, so that small ones of either sign have zeros in their upper planes), in planes.
- `SPARSE` takes `length` bytes. Its payload is `gaps` bytes that say how many elements stay before one that changes
  (255: so many stay, and none changes); a bit for each of the `changes`, from the lowest of each byte on, that is 1
  where something is taken away; and how much more than 1 is added or taken away, in planes.
"""

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
