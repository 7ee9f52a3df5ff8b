"""What decides whether an earlier conversion is of use, and what a damaged one comes to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters import cache
from converters.cache import CandidateCache, Kept, data_digests, pack, unpack, work_digest
from converters.job import BuildJob, CacheFolder, DataFile, Measurements, PassRecord, SourceFile, Target
from converters.planner import RECIPES, REPAIRS
from converters.step import Recipe

MEASURED = Measurements(3, 1, 1.0, None, None, None, (), 1.0, 0.0, 1.0, 1.0, 1.0, "cpu")
PASSES = (PassRecord("keep", {"a": 1}, 0.5, 3, 3),)


def recipe(name: str) -> Recipe:
    return next(one for one in (*RECIPES, *REPAIRS) if one.name == name)


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    (tmp_path / "source").write_bytes(b"net")
    (tmp_path / "cache").mkdir()
    return BuildJob(
        (SourceFile(ModelFormat.ONNX, "a" * 64, str(tmp_path / "source")),),
        Target("p", RuntimeName.ONNX, ("cpu",), (Precision.FP32,)),
        DataFile("b" * 64, "calibration"),
        DataFile("c" * 64, "evaluation"),
        cache=CacheFolder(str(tmp_path / "cache"), "x86_64 avx2"),
    )


def key(job: BuildJob, name: str = "onnx-static-u8s8") -> str:
    return CandidateCache(job).key(recipe(name), Path(job.sources[0].path))


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": None},
        {"calibration": DataFile("d" * 64, "calibration")},
        {"evaluation": DataFile("d" * 64, "evaluation")},
        {"calibration": DataFile("c" * 64, ""), "evaluation": DataFile("b" * 64, "")},
        {"cache": CacheFolder("elsewhere", "x86_64 avx512_vnni")},
        {"target": Target("p", RuntimeName.ONNX, ("cuda", "cpu"), (Precision.FP32,))},
    ],
)
def test_what_decides(job: BuildJob, change: dict[str, Any]) -> None:
    assert key(msgspec.structs.replace(job, **change)) != key(job)


@pytest.mark.parametrize(
    "change",
    [
        {"profile": "another"},
        {"precisions": (Precision.INT8,)},
        {"latency_p95_ms": 1.0},
        {"objective": "size"},
        {"threads": 4},
        {"accuracy_drop_points": 0.1},
    ],
)
def test_what_does_not(job: BuildJob, change: dict[str, Any]) -> None:
    other = msgspec.structs.replace(job, target=msgspec.structs.replace(job.target, **change))
    assert key(other) == key(job)
    assert work_digest(other) == work_digest(job)


def test_where_a_step_trades_for_accuracy_the_budget_decides(job: BuildJob) -> None:
    other = msgspec.structs.replace(job, target=msgspec.structs.replace(job.target, accuracy_drop_points=0.1))
    assert key(other, "onnx-mixed-u8s8") != key(job, "onnx-mixed-u8s8")


def test_recipes_sources_tools_and_code_decide(job: BuildJob, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key(job, one.name) for one in (*RECIPES, *REPAIRS)}
    assert len(keys) == len(RECIPES) + len(REPAIRS)
    before = key(job)
    Path(job.sources[0].path).write_bytes(b"another net")
    second = key(job)
    monkeypatch.setattr(cache, "tool_versions", lambda _: {"onnxruntime": "0"})
    third = key(job)
    monkeypatch.setattr(cache, "code_digest", lambda: "another Shoal")
    assert len({before, second, third, key(job)}) == 4


def test_every_data_set_counts(job: BuildJob) -> None:
    assert data_digests(job) == [["calibration", "b" * 64], ["evaluation", "c" * 64]]
    other = msgspec.structs.replace(job, sources=(SourceFile(ModelFormat.ONNX, "e" * 64, ""),))
    assert work_digest(other) != work_digest(job)


def test_what_was_kept_comes_back(job: BuildJob, tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"int8 net")
    kept = CandidateCache(job)
    kept.save("k", tmp_path / "made", PASSES, MEASURED)
    found = kept.load("k", tmp_path / "target")
    assert found is not None
    assert (found.passes, found.measurements) == (PASSES, MEASURED)
    assert (tmp_path / "target").read_bytes() == b"int8 net"
    assert kept.load("another", tmp_path / "nothing") is None
    off = CandidateCache(msgspec.structs.replace(job, cache=None))
    off.save("k", tmp_path / "made", PASSES, MEASURED)
    assert off.load("k", tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    (tmp_path / "made").write_bytes(b"int8 net")
    pack(Kept(PASSES, MEASURED), tmp_path / "made", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("place", [0, 7, 8, 40, -41, -40, -33, -32, -1])
def test_one_flipped_byte_is_found(packed: Path, tmp_path: Path, place: int) -> None:
    damaged = bytearray(packed.read_bytes())
    damaged[place] ^= 1
    assert unpack(packed, tmp_path / "whole") is not None
    packed.write_bytes(damaged)
    assert unpack(packed, tmp_path / "target") is None
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("length", [0, 7, 8, 31, 32, 60, -1])
def test_a_cut_one_is_found(packed: Path, tmp_path: Path, length: int) -> None:
    packed.write_bytes(packed.read_bytes()[:length])
    assert unpack(packed, tmp_path / "target") is None
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\0" * 8, (2).to_bytes(8, "big") + b"{}"])
def test_one_of_another_kind_is_a_miss(packed: Path, tmp_path: Path, content: bytes) -> None:
    packed.write_bytes(content + hashlib.sha256(content).digest())
    assert unpack(packed, tmp_path / "target") is None


def test_no_room_is_no_failure(job: BuildJob, tmp_path: Path) -> None:
    gone = CandidateCache(msgspec.structs.replace(job, cache=CacheFolder(str(tmp_path / "nowhere"), "")))
    (tmp_path / "made").write_bytes(b"net")
    gone.save("k", tmp_path / "made", PASSES, MEASURED)
    assert gone.load("k", tmp_path / "target") is None


def test_a_damaged_one_is_thrown_away(job: BuildJob, tmp_path: Path) -> None:
    assert job.cache is not None
    path = Path(job.cache.path) / "k.kept"
    path.write_bytes(b"not a kept conversion, but long enough to be one")
    assert CandidateCache(job).load("k", tmp_path / "target") is None
    assert not path.exists()
