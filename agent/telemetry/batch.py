"""Which windows a telemetry batch takes: what is too much for one would never be accepted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.protocol.limits import KIB, LIMITS
from agent.protocol.messages import ModelWindow

ROOM = LIMITS.message_bytes - 64 * KIB  # for windows; the rest of a batch needs less


def fitting(windows: Sequence[ModelWindow], room: int = ROOM) -> tuple[ModelWindow, ...]:
    """The windows in which something happened, as many as a batch takes; the largest lose sketches where they must.

    Args:
        windows: of all artifacts.
        room: bytes they may have together.
    """
    chosen = [one for one in windows if _did_something(one)][: LIMITS.models_per_batch]
    sizes = [len(msgspec.msgpack.encode(one)) for one in chosen]
    for place in sorted(range(len(chosen)), key=lambda one: -sizes[one]):
        if sum(sizes) <= room:
            break
        chosen[place] = msgspec.structs.replace(chosen[place], predicted={}, inputs={}, outputs={})
        sizes[place] = len(msgspec.msgpack.encode(chosen[place]))
    return tuple(chosen)


def _did_something(window: ModelWindow) -> bool:
    return bool(window.requests or window.rejected or window.confusion or window.crashes or window.dropped)
