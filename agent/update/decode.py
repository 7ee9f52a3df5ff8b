"""The decoding process: `python -m agent.update.decode CODEC ENCODED BASE TARGET SIZE PARENT`; BASE may be empty.

A process of its own, so that it neither holds up what the supervisor does nor takes it along when memory ends. It
imports as little as can be: its memory is what a small device has to spare. What went wrong, it says in a line.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from agent.parent import end_first, end_with_parent
from agent.update.delta import DecodeError, decode

DAMAGED, STORAGE, MEMORY = 2, 3, 4  # exit statuses
NICE = 10
MOST_BYTES = 64 << 20  # of data, whatever the encoding says; it takes a tenth of that


def main(arguments: list[str]) -> int:
    """Decode one encoding; the exit status says how it went."""
    codec, encoded, base, target, size, parent = arguments
    end_with_parent(int(parent))
    end_first()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    with contextlib.suppress(OSError):
        os.nice(NICE)  # what serves goes first
    try:
        opened = [os.open(path, os.O_RDONLY) for path in (encoded, base) if path]
        written = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        decode(codec, opened[0], opened[1] if base else None, written, int(size))
        os.fsync(written)
    except DecodeError as error:
        return _say(DAMAGED, str(error))
    except OSError as error:
        return _say(STORAGE, error.strerror or str(error))
    except MemoryError:
        return _say(MEMORY, "there is not enough memory")
    return 0


def _say(status: int, sentence: str) -> int:
    os.write(1, sentence[:300].encode(errors="replace"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
