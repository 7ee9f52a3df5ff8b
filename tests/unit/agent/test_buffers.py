"""Memory that requests arrive in: nobody's twice at once, aligned, and bounded."""

from __future__ import annotations

import numpy as np
import pytest

from agent.serving.buffers import ALIGNED, KEPT_BYTES, LARGEST, Buffers


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_what_nothing_refers_to_any_more_is_given_out_again() -> None:
    buffers = Buffers()
    first = buffers.take(100_000)
    there = address(first)
    assert address(buffers.take(100_000)) != there
    del first
    assert address(buffers.take(90_000)) == there


def test_an_array_keeps_its_memory_when_the_view_has_gone() -> None:
    buffers = Buffers()
    view = buffers.take(100_000)
    array = np.frombuffer(view[:4000], np.float32)
    array[:] = 1.0
    del view
    others = [buffers.take(100_000) for _ in range(5)]
    for other in others:
        other[:] = bytes(len(other))
    assert (array == 1.0).all()


@pytest.mark.parametrize("head", [0, 1, 63, 64, 1234])
@pytest.mark.parametrize("size", [5000, LARGEST])
def test_what_follows_the_head_is_aligned(head: int, size: int) -> None:
    view = Buffers().take(size, head)
    assert len(view) == size
    assert (address(view) + head) % ALIGNED == 0


def test_small_pieces_do_not_take_large_ones_and_what_is_kept_is_bounded() -> None:
    buffers = Buffers()
    large = buffers.take(LARGEST // 2)
    there = address(large)
    del large
    assert address(buffers.take(20_000)) != there
    held = [buffers.take(LARGEST // 2) for _ in range(4 * KEPT_BYTES // LARGEST)]
    assert len({address(view) for view in held}) == len(held)
    del held
    again = [buffers.take(LARGEST // 2) for _ in range(4 * KEPT_BYTES // LARGEST)]
    assert len({address(view) for view in again}) == len(again)
