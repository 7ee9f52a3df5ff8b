"""Regions of shared memory: hostile keys, bounds, objects that shrink or go. A folder stands in for the system's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.serving import shared_memory
from agent.serving.buffers import Buffers
from agent.serving.shared_memory import RegionError, Regions


@pytest.fixture
def regions(tmp_path: Path) -> Regions:
    folder = tmp_path / "shm"
    folder.mkdir()
    (folder / "frames").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_bytes(b"not yours")
    return Regions(Buffers(), folder)


def object_of(tmp_path: Path) -> Path:
    return tmp_path / "shm" / "frames"


@pytest.mark.parametrize("key", ["frames", "/frames"])
def test_a_part_of_an_object_is_read_and_written(regions: Regions, tmp_path: Path, key: str) -> None:
    regions.register("r", key, 10, 50)
    assert regions.read("r", 5, 4) == bytes(range(15, 19))
    regions.write("r", 46, b"last")
    assert object_of(tmp_path).read_bytes()[56:60] == b"last"
    for offset, size in ((47, 4), (0, 51), (-1, 4), (0, -1), (1 << 62, 1)):
        with pytest.raises(RegionError, match="beyond its 50"):
            regions.read("r", offset, size)


@pytest.mark.parametrize(
    "key", ["", "/", ".", "..", "/..", "/../secret", "../secret", "//frames", "a/b", "x\0", "x" * 300]
)
def test_a_key_names_an_object_and_no_path(regions: Regions, key: str) -> None:
    with pytest.raises(RegionError, match="no key of shared memory"):
        regions.register("r", key, 0, 4)


def test_what_is_no_object_is_refused(regions: Regions, tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    for key in ("link", "folder", "nothing"):
        with pytest.raises(RegionError, match="can't be opened"):
            regions.register("r", key, 0, 4)
    with pytest.raises(RegionError, match="is no shared memory"):
        regions.register("r", "pipe", 0, 4)
    with pytest.raises(RegionError, match="semaphore"):
        regions.register("r", "sem.lock", 0, 4)
    assert regions.all() == []


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (-1, 4), (0, 0), (0, -4), (1 << 62, 1 << 62)])
def test_a_region_lies_in_its_object(regions: Regions, offset: int, size: int) -> None:
    with pytest.raises(RegionError):
        regions.register("r", "frames", offset, size)
    assert regions.all() == []


def test_an_object_that_shrank_is_not_read_and_not_grown(regions: Regions, tmp_path: Path) -> None:
    regions.register("r", "frames", 0, 100)
    os.truncate(object_of(tmp_path), 20)
    assert regions.read("r", 0, 20) == bytes(range(20))
    for act in (lambda: regions.read("r", 0, 21), lambda: regions.write("r", 18, b"abc")):
        with pytest.raises(RegionError, match="smaller than it was registered"):
            act()
    assert object_of(tmp_path).stat().st_size == 20


def test_another_object_of_the_same_key_is_another_one(regions: Regions, tmp_path: Path) -> None:
    regions.register("r", "frames", 0, 4)
    object_of(tmp_path).unlink()
    object_of(tmp_path).write_bytes(b"else")
    assert regions.read("r", 0, 4) == bytes(range(4))


def test_there_are_only_so_many(regions: Regions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(shared_memory, "REGIONS_LIMIT", 3)
    for number in range(3):
        regions.register(f"r{number}", "frames", 0, 4)
    with pytest.raises(RegionError, match="unregister some"):
        regions.register("more", "frames", 0, 4)
    object_of(tmp_path).unlink()
    (tmp_path / "shm" / "other").write_bytes(bytes(200))
    regions.register("more", "other", 0, 4)  # those of an object that is gone have made room
    assert [one.name for one in regions.all()] == ["more"]
    monkeypatch.setattr(shared_memory, "TOTAL_LIMIT", 100)
    with pytest.raises(RegionError, match="unregister some"):
        regions.register("large", "other", 0, 97)
    regions.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_tensor_may_not_be_larger_than_a_body(
    regions: Regions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "TENSOR_LIMIT", 8)
    regions.register("r", "frames", 0, 100)
    with pytest.raises(RegionError, match="a tensor may have 8"):
        regions.read("r", 0, 9)
