"""Which kept conversions go when there are too many, and that a folder is as good as its store."""

from __future__ import annotations

import datetime as dt
import platform
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.cache import work_digest
from converters.job import BuildJob, SourceFile, Target
from fleet_server.catalog.artifacts import ArtifactStore, StoreEntry
from fleet_server.conversions.cache import USED, kept_conversions, sweep_cache, too_much
from fleet_server.conversions.files import WorkFolder

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
JOB = BuildJob(
    (SourceFile(ModelFormat.ONNX, "a" * 64, ""),), Target("p", RuntimeName.ONNX, ("cpu",), (Precision.FP32,))
)
ENTRY = "1" * 64 + ".kept"


def entry(size: int, days: int) -> StoreEntry:
    return StoreEntry(size, START + dt.timedelta(days=days))


@pytest.mark.parametrize(
    ("limit", "gone"),
    [(100, []), (45, []), (44, ["b"]), (25, ["b"]), (24, ["b", "c"]), (4, ["b", "c", "a"]), (0, ["b", "c", "a"])],
)
def test_works_that_were_not_used_for_longest_go_first(limit: int, gone: list[str]) -> None:
    entries = {
        "s/a/1": entry(5, 0),  # old, but its work was used last
        "s/a/used": entry(0, 9),
        "s/b/1": entry(10, 1),
        "s/b/2": entry(10, 2),
        "s/b/used": entry(0, 2),
        "s/c/1": entry(20, 3),
        "s/c/used": entry(0, 3),
    }
    removed = too_much(entries, limit)
    assert list(dict.fromkeys(path.rpartition("/")[0] for path in removed)) == [f"s/{one}" for one in gone]
    assert set(removed) == {path for path in entries if path.split("/")[1] in gone}


def work(store: ArtifactStore, folder: Path) -> WorkFolder:
    folder.mkdir()
    return WorkFolder(folder, store)


def test_what_is_new_is_kept_and_comes_back(tmp_path: Path) -> None:
    store = ArtifactStore.open(None, folder=tmp_path / "store")
    (tmp_path / "source").write_bytes(b"source")
    source = store.put_file(tmp_path / "source")[0]
    job = msgspec.structs.replace(JOB, sources=(SourceFile(ModelFormat.ONNX, source, ""),))
    kept = store.derived(source).folder(work_digest(job))
    with kept_conversions(job, work(store, tmp_path / "one")) as folder:
        (Path(folder.path) / ENTRY).write_bytes(b"kept")
        (Path(folder.path) / "something else").write_bytes(b"x")
        assert folder.machine.startswith(platform.machine())
    assert set(kept.entries()) == {ENTRY, USED}
    with kept_conversions(job, work(store, tmp_path / "two")) as folder:
        assert (Path(folder.path) / ENTRY).read_bytes() == b"kept"
    with suppress(ZeroDivisionError), kept_conversions(job, work(store, tmp_path / "three")) as folder:
        (Path(folder.path) / ("2" * 64 + ".kept")).write_bytes(b"of a build that failed")
        raise ZeroDivisionError
    assert set(kept.entries()) == {ENTRY, USED}
    sweep_cache(store, 4)
    assert set(kept.entries()) == {ENTRY, USED}
    sweep_cache(store, 3)
    assert kept.entries() == {}


def test_what_was_derived_goes_with_its_source_also_when_that_goes_meanwhile(tmp_path: Path) -> None:
    store = ArtifactStore.open(None, folder=tmp_path / "store")
    (tmp_path / "source").write_bytes(b"source")
    source = store.put_file(tmp_path / "source")[0]
    job = msgspec.structs.replace(JOB, sources=(SourceFile(ModelFormat.ONNX, source, ""),))
    with kept_conversions(job, work(store, tmp_path / "one")) as folder:
        (Path(folder.path) / ENTRY).write_bytes(b"kept")
    assert len(store.derived(source).entries()) == 2
    store.delete(source)
    assert store.derived(source).entries() == {}
    with kept_conversions(job, work(store, tmp_path / "two")) as folder:
        (Path(folder.path) / ENTRY).write_bytes(b"kept")
    assert store.derived(source).entries() == {}
