"""Samples alone: which are chosen, that bounds hold whatever comes, and that files are whole or not there."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.samples import LISTING, Sampling
from agent.samples.archive import Bounds, pack
from agent.samples.keeping import KeptSamples
from agent.samples.offering import Sampler
from agent.samples.reservoir import Reservoir, key_of
from agent.samples.sample import Sample, SampleTensor, packed, read_sample
from agent.samples.sending import AGAIN_S, AHEAD, PIECE, Sending

CHANCES = st.floats(0, 1, exclude_max=True)


@given(
    st.lists(st.tuples(CHANCES, CHANCES, st.integers(0, 400)), max_size=60), st.integers(0, 10), st.integers(0, 1000)
)
def test_bounds_hold_whatever_comes(stream: list[tuple[float, float, int]], most: int, most_bytes: int) -> None:
    reservoir = Reservoir[int](most, most_bytes)
    kept: set[int] = set()
    for number, (confidence, chance, size) in enumerate(stream):
        key = key_of(confidence, chance)
        admitted = reservoir.admits(key)
        gone = {entry.value for entry in reservoir.add(key, size, 0.0, number)}
        assert admitted or number in gone or most_bytes < sum(one[2] for one in stream)
        kept = (kept | {number}) - gone
        assert kept == {entry.value for entry in reservoir}
        assert len(reservoir) <= most
        assert reservoir.bytes == sum(entry.size for entry in reservoir) <= most_bytes


@given(st.lists(st.tuples(CHANCES, CHANCES), min_size=1, max_size=80), st.integers(1, 10), st.integers(1, 20))
def test_the_choice_out_of_choices_is_that_out_of_all(stream: list[tuple[float, float]], most: int, piece: int) -> None:
    """So may the worker choose in memory, and the supervisor among what it is handed, with restarts in between."""
    keys = [key_of(*one) for one in stream]
    whole, second = Reservoir[int](most, 10**9), Reservoir[int](most, 10**9)
    for number, key in enumerate(keys):
        whole.add(key, 1, 0.0, number)
    for start in range(0, len(keys), piece):
        first = Reservoir[int](most, 10**9)
        for number, key in list(enumerate(keys))[start : start + piece]:
            first.add(key, 1, 0.0, number)
        for entry in first:
            second.add(entry.key, 1, 0.0, entry.value)
    assert sorted(one.key for one in whole) == sorted(one.key for one in second)


@given(CHANCES, CHANCES, CHANCES)
def test_the_less_sure_is_preferred_at_the_same_chance(one: float, other: float, chance: float) -> None:
    lower, higher = sorted((one, other))
    assert key_of(lower, chance) >= key_of(higher, chance)


def test_a_row_is_chosen_as_often_as_its_odds_say() -> None:
    """One place; of two rows the one with three times the odds to be wrong has it three times as often."""
    chance = random.Random(7).random
    won = 0
    for _ in range(20_000):
        reservoir = Reservoir[str](1, 100)
        reservoir.add(key_of(0.25, chance()), 1, 0.0, "unsure")  # odds 3
        reservoir.add(key_of(0.5, chance()), 1, 0.0, "surer")  # odds 1
        won += next(iter(reservoir)).value == "unsure"
    assert won / 20_000 == pytest.approx(0.75, abs=0.02)


def manifest() -> Manifest:
    return Manifest(
        "a" * 64, 1, 1, "m", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 3)),),
    )  # fmt: skip


def offered(sampler: Sampler, scores: list[list[float]]) -> None:
    y = np.array(scores, np.float32)
    x = np.arange(2 * len(y), dtype=np.float32).reshape(-1, 2)
    sampler.offer({"x": x}, {"y": y}, len(y))


def test_the_worker_offers_unsure_rows_alone_with_what_went_in_and_came_out() -> None:
    sampler = Sampler(manifest(), Sampling("m", below=0.6), clock=lambda: 5.0)
    offered(sampler, [[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [float("nan"), 0, 0], [0.2, 0.5, 0.3]])
    found = sorted(sampler.take(), key=lambda one: one.confidence)
    assert [one.confidence for one in found] == pytest.approx([0.4, 0.5])
    assert [np.frombuffer(one.inputs[0].data, "<f4").tolist() for one in found] == [[2.0, 3.0], [6.0, 7.0]]
    assert found[0].inputs[0].shape == (1, 2)
    assert (found[0].model, found[0].version, found[0].digest, found[0].at) == ("m", "1", "a" * 64, 5.0)
    assert sampler.take() == ()


def test_the_worker_offers_nothing_of_what_is_no_classifier_and_nothing_too_large() -> None:
    sampler = Sampler(manifest(), Sampling("m", below=1.0))
    sampler.offer({"x": np.zeros((1, 2), np.float32)}, {"y": np.zeros((1, 1), np.float32)}, 1)
    small = Sampler(manifest(), Sampling("m", below=1.0, sample_bytes=10))
    offered(small, [[0.4, 0.3, 0.3]])
    assert (sampler.take(), small.take()) == ((), ())


def test_what_fails_in_choosing_fails_no_request() -> None:
    sampler = Sampler(manifest(), Sampling("m"))
    sampler.offer({}, {}, 1)  # raises inside
    offered(sampler, [[0.4, 0.3, 0.3]])
    assert sampler.take() == ()


def sample(confidence: float = 0.5, *, model: str = "m", size: int = 8, key: float = -1.0, at: float = 0.0) -> Sample:
    x = SampleTensor("x", "FP32", (1, size // 4), bytes(size))
    y = SampleTensor("label", "BYTES", (1,), b"\x03\0\0\0cat")
    return Sample("m" if model == "m" else model, "1", "a" * 64, at, confidence, key, (x,), (y,))


def shelf(folder: Path, *, most_bytes: int = 1 << 20, **fields: object) -> KeptSamples:
    kept = KeptSamples(folder / "samples", most_bytes=most_bytes, floor_bytes=0)
    kept.open({"m": msgspec.structs.replace(Sampling("m"), **fields)})
    return kept


def files(folder: Path) -> list[Path]:
    return sorted((folder / "samples").glob("*")) if (folder / "samples").is_dir() else []


def test_kept_samples_are_found_again_and_go_when_they_are_not_wanted(tmp_path: Path) -> None:
    shelf(tmp_path).add([sample(0.3), sample(0.2), sample(0.1, model="other")])
    again = shelf(tmp_path)
    assert [one.confidence for one in again.of("m")] == [0.2, 0.3]
    assert oct(files(tmp_path)[0].stat().st_mode)[-3:] == "600"
    again.want({})
    assert not (tmp_path / "samples").exists()
    assert (again.count, again.bytes) == (0, 0)


def test_what_is_half_written_or_damaged_is_removed(tmp_path: Path) -> None:
    shelf(tmp_path).add([sample(0.3)])
    (whole,) = files(tmp_path)
    body = whole.read_bytes()
    for number, content in enumerate((b"", body[:-1], body[:40] + b"x" + body[41:], b"rubbish")):
        whole.with_name(f"{number:032x}.sample").write_bytes(content)
    whole.with_name(f".{'0' * 32}.sample.999999999.tmp").write_bytes(body[:10])
    assert shelf(tmp_path).count == 1
    assert files(tmp_path) == [whole]


@settings(deadline=None)  # the disk may be slow
@given(st.lists(st.tuples(CHANCES, CHANCES, st.integers(4, 400)), max_size=12))
def test_on_the_disk_the_bounds_hold_too(stream: list[tuple[float, float, int]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        kept = shelf(folder, most_bytes=1500, samples=4, bytes=1200)
        for confidence, chance, size in stream:
            kept.add([sample(confidence, size=size, key=key_of(confidence, chance))])
            assert kept.count == len(files(folder)) <= 4
            assert kept.bytes == sum(one.stat().st_size for one in files(folder)) <= 1200


def test_old_ones_go_and_those_of_a_clock_that_was_wrong(tmp_path: Path) -> None:
    kept = shelf(tmp_path, days=1.0)
    kept.add([sample(at=0.0), sample(at=1000.0), sample(at=10 * 86_400.0)])
    kept.expire(86_500.0)
    assert kept.count == len(files(tmp_path)) == 1


def test_the_one_that_would_go_first_goes_when_the_disk_is_short(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    kept.add([sample(0.1, key=-1.0), sample(0.2, key=-9.0)])
    assert kept.drop_lowest()
    assert [one.confidence for one in kept.of("m")] == [0.1]
    assert kept.drop_lowest()
    assert not kept.drop_lowest()
    full = KeptSamples(tmp_path / "samples", most_bytes=1 << 20, floor_bytes=1 << 60)
    full.open({"m": Sampling("m")})
    full.add([sample()])
    assert full.count == 0


def test_the_file_that_is_sent_is_numpys_and_holds_no_pickle(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    kept.add([sample(0.4, size=16), sample(0.2, size=16)])
    found = pack(kept.of("m"), tmp_path / "up.npz", Bounds(10, 1 << 20))
    assert found is not None
    assert found.size == (tmp_path / "up.npz").stat().st_size
    with np.load(tmp_path / "up.npz", allow_pickle=False) as arrays:
        assert arrays["0/in/x"].shape == (1, 4)
        assert arrays["0/in/x"].dtype == np.float32
        assert arrays["1/out/label"].tobytes() == b"\x03\0\0\0cat"
    with zipfile.ZipFile(tmp_path / "up.npz") as archive:
        lines = msgspec.json.decode(archive.read(LISTING))
    assert [one["confidence"] for one in lines] == [0.2, 0.4]
    assert lines[0]["outputs"] == [{"name": "label", "datatype": "BYTES", "shape": [1]}]


@given(st.lists(st.integers(4, 3000), min_size=1, max_size=6), st.integers(1, 6), st.integers(1000, 20_000))
def test_the_file_that_is_sent_keeps_its_bounds(sizes: list[int], most: int, most_bytes: int) -> None:
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        kept = shelf(folder)
        for size in sizes:
            x = SampleTensor("x", "UINT8", (1, size), rng.bytes(size))
            kept.add([msgspec.structs.replace(sample(), inputs=(x,))])
        found = pack(kept.of("m"), folder / "up.npz", Bounds(most, most_bytes))
        if found is None:
            assert not list(folder.glob("up*"))
        else:
            assert len(found.names) <= most
            assert found.size <= most_bytes


@given(st.binary(max_size=300))
def test_no_bytes_but_a_sample_are_one(content: bytes) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "x.sample"
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_sample(path)
        path.write_bytes(packed(sample()) + content)
        if content:
            with pytest.raises(ValueError):
                read_sample(path)


@given(st.integers(1, 12 * PIECE), st.data())
def test_a_lossy_way_brings_every_byte_once_in_order(size: int, data: st.DataObject) -> None:
    """Connections end and messages are lost: what the server has grows by pieces in order until it is whole."""
    sending, has, now, rounds = Sending(size), 0, 0.0, 0
    way = io.BytesIO()
    while has < size:
        rounds += 1
        assert rounds < 500
        for offset, length in sending.due(AHEAD, now):
            assert 0 < length <= PIECE
            assert offset + length <= size
            if rounds > 30 or data.draw(st.booleans(), label="arrives"):
                if offset == has:
                    way.write(bytes(length))
                    has += length
                if rounds > 30 or data.draw(st.booleans(), label="answered"):
                    sending.acknowledged(has, now)
        if data.draw(st.integers(0, 9), label="breaks") == 0:
            sending.link_up()
        now += AGAIN_S / 2
    assert len(way.getvalue()) == size
