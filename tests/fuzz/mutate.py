"""Changes to a message that keep its format: a value, a key, a length. Bytes alone seldom get past a decoder's door."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 255, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, -0.0, 0.5, "", "\0", "a" * 200,
    "²", "../../etc/passwd", "shoal/v1/#", [], {}, [[]], b"", b"\xff" * 8,
)  # fmt: skip


def mutated(payload: bytes, chance: random.Random) -> bytes:
    """The payload with one to three of its values changed, in its own format; unchanged when it has none."""
    packed = False
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            value, packed = msgspec.msgpack.decode(payload), True
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            return payload
    for _ in range(chance.randint(1, 3)):
        value = _changed(value, chance)
    try:
        return msgspec.msgpack.encode(value) if packed else msgspec.json.encode(value)
    except (msgspec.MsgspecError, TypeError, OverflowError, RecursionError, UnicodeEncodeError):
        return payload


def _changed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        act = chance.random()
        if act < 0.75:
            value[key] = _changed(value[key], chance)
        elif act < 0.85:
            del value[key]
        elif isinstance(value, list):
            # Rows of rows of hundreds would be the fuzzer's memory, and not the decoder's.
            many = 1 if isinstance(value[key], (dict, list)) else 300
            value.extend(copy.deepcopy(value[key]) for _ in range(chance.choice((1, 2, many))))
        else:
            value[chance.choice(("", "y", "\0", "x" * 300, key))] = copy.deepcopy(value[key])
        return value
    return copy.deepcopy(chance.choice(VALUES))  # or what changes one place would change others
