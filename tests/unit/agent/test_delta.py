"""The decoder makes what the operations say, and of anything else an error: bounded in bytes, in work and in memory."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.delta import (
    ADD,
    BLOCK,
    CHANGES,
    COPY,
    DELTA,
    LITERAL,
    NO_CHANGE,
    SPARSE,
    WINDOW_LOG,
    ZSTD,
    most_operations,
)
from agent.update import decode
from agent.update.delta import DecodeError
from tests.delta_files import decoded, frame, operation

BASE = bytes(random.Random(1).randbytes(4096))


def zigzag(value: int, width: int) -> int:
    bits = 8 * width
    signed = (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    return ((signed << 1) ^ (signed >> (bits - 1))) % (1 << bits)


def planes(values: list[int], width: int) -> bytes:
    return b"".join(bytes(value >> (8 * plane) & 255 for value in values) for plane in range(width))


def signed(zigzags: list[int], width: int) -> bytes:
    """What a SPARSE has behind its gaps."""
    less = sum((value & 1) << index for index, value in enumerate(zigzags))
    more = [(value >> 1) - 1 + (value & 1) for value in zigzags]
    return less.to_bytes((len(zigzags) + 7) // 8, "little") + planes(more, width)


@settings(max_examples=150, deadline=None)
@given(width=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_differences_are_added_modulo_the_width(width: int, data: st.DataObject) -> None:
    numbers = st.integers(0, (1 << 8 * width) - 1) | st.sampled_from([0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1)])
    old = data.draw(st.lists(numbers, min_size=1, max_size=40))
    new = [data.draw(numbers) for _ in old]
    base, target = (np.array(values, f"<u{width}").tobytes() for values in (old, new))
    added = [zigzag(b - a, width) for a, b in zip(old, new, strict=True)]
    dense = operation(ADD, len(base), planes(added, width), width=width)
    assert decoded(DELTA, frame(dense), base, len(base)) == target
    changed = [index for index, value in enumerate(added) if value]
    if changed:
        gaps = bytes(b - a - 1 for a, b in zip([-1, *changed], changed, strict=False))
        values = signed([added[index] for index in changed], width)
        sparse = operation(SPARSE, len(base), gaps + values, width=width, changes=len(changed), gaps=len(gaps))
        assert decoded(DELTA, frame(sparse), base, len(base)) == target


def test_long_stretches_cross_the_slices_of_arithmetic() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 32, 3 * BLOCK // 4, np.uint32)
    new = old.copy()
    new[[5, 70_000, len(new) - 1]] += 7
    gaps = bytes([5]) + bytes([NO_CHANGE]) * ((70_000 - 6) // NO_CHANGE) + bytes([(70_000 - 6) % NO_CHANGE])
    rest = len(new) - 1 - 70_001
    gaps += bytes([NO_CHANGE]) * (rest // NO_CHANGE) + bytes([rest % NO_CHANGE])
    sparse = operation(SPARSE, old.nbytes, gaps + signed([14, 14, 14], 4), width=4, changes=3, gaps=len(gaps))
    assert decoded(DELTA, frame(sparse), old.tobytes(), old.nbytes) == new.tobytes()


def test_copies_skip_both_ways() -> None:
    content = operation(COPY, 10, skip=100) + operation(LITERAL, 4, b"acbd", width=2) + operation(COPY, 5, skip=-110)
    assert decoded(DELTA, frame(content), BASE, 19) == BASE[100:110] + b"abcd" + BASE[:5]


WRONG = {
    "cut off": operation(LITERAL, 4, b"abcd")[:-1],
    "no operation": operation(9, 4),
    "a width of 3": operation(LITERAL, 3, b"abc", width=3),
    "half an element": operation(LITERAL, 3, b"abc", width=2),
    "nothing made": operation(COPY, 0),
    "more than the artifact": operation(LITERAL, 5, b"abcde"),
    "before the base": operation(COPY, 4, skip=-1),
    "behind the base": operation(COPY, 4, skip=len(BASE) - 3),
    "far behind the base": operation(COPY, 4, skip=(1 << 63) - 1),
    "more made than asked for": operation(COPY, 4) + operation(COPY, 1),
    "no change": operation(SPARSE, 4, b"", changes=0, gaps=0),
    "changes without gaps": operation(SPARSE, 4, b"ab", changes=2, gaps=1),
    "other gaps than changes": operation(SPARSE, 4, b"\xff\0\0\2\2", changes=2, gaps=2),
    "a change behind the end": operation(SPARSE, 4, b"\4\0\2", changes=1, gaps=1),
    "a second change behind the end": operation(SPARSE, 4, b"\3\0\0\2\2", changes=2, gaps=2),
    "more changes than elements": operation(SPARSE, 4, bytes(10), changes=5, gaps=5),
    "too many changes": operation(SPARSE, 4, b"", changes=CHANGES + 1, gaps=CHANGES + 1),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        decoded(DELTA, frame(content), BASE, 4)


def test_a_large_operation_is_refused() -> None:
    for kind in (LITERAL, ADD):
        with pytest.raises(DecodeError):
            decoded(DELTA, frame(operation(kind, BLOCK + 1, bytes(BLOCK + 1))), bytes(BLOCK + 1), BLOCK + 1)


def test_work_is_bounded() -> None:
    size = 100_000
    with pytest.raises(DecodeError):
        decoded(DELTA, frame(operation(COPY, 1) + operation(COPY, 1, skip=-1) * size), BASE, size)
    assert most_operations(size) < size


def test_without_a_base_nothing_can_be_taken() -> None:
    with pytest.raises(DecodeError):
        decoded(DELTA, frame(operation(COPY, 1)), None, 1)
    assert decoded(DELTA, frame(operation(LITERAL, 1, b"x")), None, 1) == b"x"


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=1, max_size=5000))
def test_a_whole_artifact_comes_back(content: bytes) -> None:
    assert decoded(ZSTD, frame(content), None, len(content)) == content
    for wrong in (frame(content)[:-1], frame(content) + b"x", frame(content) * 2, frame(content + b"x"), content):
        with pytest.raises(DecodeError):
            decoded(ZSTD, wrong, None, len(content))


def test_a_frame_that_asks_for_a_large_window_is_refused() -> None:
    content = os.urandom(1 << 22) + bytes(1 << 23)
    with pytest.raises(DecodeError):
        decoded(ZSTD, frame(content, window_log=WINDOW_LOG + 2), None, len(content))


def test_a_bomb_makes_no_more_than_the_artifact() -> None:
    for codec in (ZSTD, DELTA):
        with pytest.raises(DecodeError):
            decoded(codec, frame(bytes(1 << 28)), BASE, 1000)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(DecodeError):
        decoded("delta-2", frame(b"x"), None, 1)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_changed_operations_end_in_the_decoders_own_error(seed: int) -> None:
    chance = random.Random(seed)
    gaps = bytes([3, 200, NO_CHANGE, 9])
    content = bytearray(
        operation(COPY, 512, skip=17)
        + operation(ADD, 512, bytes(512), width=4)
        + operation(SPARSE, 1024, gaps + signed([1, 2, 3], 2), width=2, changes=3, gaps=len(gaps))
        + operation(LITERAL, 64, bytes(64), width=8)
    )
    for _ in range(chance.choice((1, 2, 5))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    packed = frame(bytes(content)) if chance.random() < 0.7 else bytes(changed(frame(bytes(content)), chance))
    with contextlib.suppress(DecodeError):
        decoded(DELTA, packed, BASE, 2112)


def changed(packed: bytes, chance: random.Random) -> bytearray:
    spoilt = bytearray(packed)
    spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
    return spoilt[: chance.randrange(1, len(spoilt) + 1)]


# -- the process


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent.update.decode", *map(str, arguments), str(os.getpid())]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_process_says_what_went_wrong(tmp_path: Path) -> None:
    encoded, base, target = tmp_path / "encoded", tmp_path / "base", tmp_path / "target"
    base.write_bytes(BASE)
    encoded.write_bytes(frame(operation(COPY, 100)))
    assert run(DELTA, encoded, base, target, 100).returncode == 0
    assert target.read_bytes() == BASE[:100]
    damaged = run(DELTA, encoded, base, target, 101)
    assert (damaged.returncode, damaged.stdout) == (decode.DAMAGED, "it ends early")
    absent = run(DELTA, encoded, tmp_path / "absent", target, 100)
    assert (absent.returncode, absent.stdout) == (decode.STORAGE, "No such file or directory")


@pytest.mark.parametrize("megabytes", [8, 64])
def test_memory_does_not_grow_with_the_artifact(tmp_path: Path, megabytes: int) -> None:
    """Eight MB over a bare Python: the goal; measured on the process that devices run."""
    count = megabytes << 20
    rng = np.random.default_rng(0)
    (tmp_path / "base").write_bytes(bytes(count))
    noise = rng.integers(0, 256, BLOCK, np.uint8).tobytes()
    with (tmp_path / "encoded").open("wb") as file:
        content = b"".join(
            operation(ADD, BLOCK, noise, width=4) if index % 2 else sparse_block(rng) for index in range(count // BLOCK)
        )
        file.write(frame(content))
    arguments = [DELTA, *(str(tmp_path / name) for name in ("encoded", "base", "target")), str(count), "0"]
    decoding = peak_kb("from agent.update import decode; assert not decode.main(sys.argv[1:])", *arguments)
    assert 2000 < decoding - peak_kb("pass") < 8000
    assert (tmp_path / "target").stat().st_size == count


def sparse_block(rng: np.random.Generator) -> bytes:
    changes = BLOCK // 4 // 2
    values = rng.integers(0, 256, changes * 4, np.uint8).tobytes()
    return operation(
        SPARSE, BLOCK, bytes([1]) * changes + bytes(changes // 8) + values, width=4, changes=changes, gaps=changes
    )


def peak_kb(code: str, *arguments: str) -> int:
    """The most that a process had resident. (What `wait4` says counts its parent's memory before the exec.)"""
    code = f"import sys; {code}; print(*[one.split()[1] for one in open('/proc/self/status') if 'VmHWM' in one])"
    return int(subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, check=True).stdout)


def test_the_process_imports_next_to_nothing() -> None:
    code = "import sys; from agent.update import decode; print(*sys.modules)"
    found = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert found.isdisjoint({"msgspec", "paho", "numpy", "subprocess", "sqlite3", "ssl"})
