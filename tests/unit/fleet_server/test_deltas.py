"""Encodings come back as the artifact, however they were found; tensors are found in what converters write."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from agent.protocol.delta import DELTA, ZSTD
from fleet_server.deltas import encode, matching
from fleet_server.deltas.encode import Encoded, encode_difference, encode_full
from fleet_server.deltas.tensors import Region, find_regions
from tests.delta_files import decoded

PLANS = {"blocks": matching.by_blocks, "suffixes": matching.by_suffixes}


def model(weights: dict[str, np.ndarray], path: Path) -> Path:
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], tensors)), path)
    return path


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "body": rng.standard_normal((300, 257)).astype(np.float32) * np.float32(0.05),
        "scale": rng.standard_normal(300).astype(np.float32),
        "head": rng.integers(-99, 99, (40, 301)).astype(np.int8),
    }


def back(found: Encoded, base: Path | None, target: Path) -> bytes:
    held = None if base is None else base.read_bytes()
    return decoded(found.codec, found.path.read_bytes(), held, target.stat().st_size)


def both(old: dict[str, np.ndarray], new: dict[str, np.ndarray], folder: Path) -> tuple[Path, Path, Encoded]:
    base, target = model(old, folder / "old.onnx"), model(new, folder / "new.onnx")
    found = encode_difference(base, target, folder, suffixes_mb=10)
    assert back(found, base, target) == target.read_bytes()
    return base, target, found


def test_a_few_weights_cost_a_few_bytes(tmp_path: Path) -> None:
    old, new = weights(0), weights(0)
    where = np.random.default_rng(1).random(new["body"].shape) < 0.02
    new["body"][where] *= np.float32(1.01)
    _, target, found = both(old, new, tmp_path)
    assert (found.codec, found.plan) == (DELTA, "tensors")
    assert found.size < 0.025 * target.stat().st_size


def test_a_little_noise_on_every_weight_costs_its_own_bits(tmp_path: Path) -> None:
    old, new = weights(0), weights(0)
    new["body"] += np.random.default_rng(1).standard_normal(new["body"].shape).astype(np.float32) * np.float32(5e-5)
    _, target, found = both(old, new, tmp_path)
    assert found.plan == "tensors"
    assert found.size < 0.62 * target.stat().st_size


def test_one_more_class_reuses_the_others(tmp_path: Path) -> None:
    old, more = weights(0), weights(1)["body"][:10]
    new = {**old, "body": np.concatenate([old["body"], more])}
    _, target, found = both(old, new, tmp_path)
    assert found.size < 1.1 * 10 * 257 * 4 + 1000 < 0.1 * target.stat().st_size


def test_renamed_tensors_are_found_by_their_size(tmp_path: Path) -> None:
    old = weights(0)
    new = {f"{name}_1": value + value.dtype.type(1) for name, value in weights(0).items()}
    _, target, found = both(old, new, tmp_path)
    assert found.plan == "tensors"
    assert found.size < 0.7 * target.stat().st_size


def test_the_same_file_costs_next_to_nothing(tmp_path: Path) -> None:
    _, _, found = both(weights(0), weights(0), tmp_path)
    assert found.size < 300


def test_a_whole_model_in_planes_is_smaller_than_zstd_makes_it(tmp_path: Path) -> None:
    target = model(weights(0), tmp_path / "m.onnx")
    full = encode_full(target, tmp_path)
    assert full.codec == DELTA
    assert back(full, None, target) == target.read_bytes()
    assert full.size < 0.9 * target.stat().st_size
    text = tmp_path / "text"
    text.write_bytes(b"the same words, again and again. " * 999)
    full = encode_full(text, tmp_path)
    assert (full.codec, back(full, None, text)) == (ZSTD, text.read_bytes())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), plan=st.sampled_from(sorted(PLANS)))
def test_any_edit_of_any_bytes_comes_back(tmp_path_factory: pytest.TempPathFactory, seed: int, plan: str) -> None:
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("edit")
    old = bytearray(chance.randbytes(chance.choice((1, 300, 5000, 400_000))))
    new = bytearray(old)
    for _ in range(chance.randrange(6)):
        at = chance.randrange(len(new) + 1)
        edit = chance.randrange(4)
        if edit == 0:
            new[at:at] = chance.randbytes(chance.randrange(3000))
        elif edit == 1 and len(new) > 2:
            del new[at : at + min(2000, len(new) - at - 1)]
        elif edit == 2:
            new[at:at] = new[: chance.randrange(len(new) + 1)]
        else:
            for place in range(at, min(len(new), at + 500)):
                new[place] = (new[place] + chance.choice((0, 0, 1, 255))) % 256
    new = new or bytearray(b"x")
    spans = PLANS[plan](memoryview(bytes(old)), memoryview(bytes(new)))
    assert sum(span.length for span in spans) == len(new)
    found = encode._delta(folder / "x", plan, memoryview(bytes(old)), memoryview(bytes(new)), spans)
    assert decoded(DELTA, found.path.read_bytes(), bytes(old), len(new)) == new


def test_a_plan_in_more_pieces_than_a_device_takes_is_none(tmp_path: Path) -> None:
    content = memoryview(bytes(50_000))
    spans = [matching.Span(1, place) for place in reversed(range(len(content)))]
    with pytest.raises(encode.TooManyOperationsError):
        encode._delta(tmp_path / "x", "pieces", content, content, spans)


def test_moved_blocks_are_found() -> None:
    old = os.urandom(100_000)
    new = b"head" + old[50_000:] + b"between" + old[:50_000]
    spans = matching.by_blocks(memoryview(old), memoryview(new))
    assert sum(span.length for span in spans if span.base is not None) == 100_000


@pytest.mark.parametrize("unlike", [0, 1, matching.FIRST_STEP - 1, matching.FIRST_STEP, 5 * matching.FIRST_STEP + 7])
def test_what_the_base_has_is_found_behind_however_much_that_it_has_not(unlike: int) -> None:
    old = random.Random(3).randbytes(1 << 20)
    strange = random.Random(4).randbytes(unlike)
    new = old[600_000:700_001] + strange + old[5000 : 5000 + matching.BLOCK * 2] + strange + old[:900_000]
    whole = [(100_001, 600_000), (matching.BLOCK * 2, 5000), (900_000, 0)]
    found = [(one.length, one.base) for one in matching.by_blocks(memoryview(old), memoryview(new))]
    assert [one for one in found if one[1] is not None] == whole
    assert sum(length for length, base in found if base is None) == 2 * unlike


def test_regions_of_an_onnx_file_are_its_tensors(tmp_path: Path) -> None:
    held = weights(0)
    path = model(held, tmp_path / "m.onnx")
    data = path.read_bytes()
    for region in find_regions(memoryview(data)):
        array = held[region.name]
        assert data[region.start : region.start + region.length] == array.tobytes()
        assert region.width == array.itemsize
        del held[region.name]
    assert not held


def test_constants_and_typed_fields_are_found_too(tmp_path: Path) -> None:
    typed = TensorProto(name="typed", data_type=TensorProto.FLOAT, dims=[50], float_data=[0.5] * 50)
    raw = numpy_helper.from_array(np.arange(60, dtype=np.int64), "constant")
    node = helper.make_node("Constant", [], ["c"], value=raw)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [], [typed])), path)
    found = {(one.name, one.length, one.width) for one in find_regions(memoryview(path.read_bytes()))}
    assert found == {("typed", 200, 4), ("constant", 480, 8)}


def test_regions_of_a_tflite_file_are_its_tensors(tmp_path: Path) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    import flatbuffers

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(500).astype(np.float32), rng.integers(-99, 99, 700).astype(np.int8)]
    net = schema.ModelT()
    net.version = 3
    graph = schema.SubGraphT()
    graph.tensors, net.buffers = [], [schema.BufferT()]
    for index, (array, kind) in enumerate(zip(arrays, (0, 9), strict=True)):
        tensor, buffer = schema.TensorT(), schema.BufferT()
        tensor.name, tensor.type, tensor.buffer, tensor.shape = f"t{index}", kind, index + 1, list(array.shape)
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        graph.tensors.append(tensor)
        net.buffers.append(buffer)
    net.subgraphs = [graph]
    builder = flatbuffers.Builder(0)
    builder.Finish(net.Pack(builder), b"TFL3")
    data = bytes(builder.Output())
    found = {one.name: one for one in find_regions(memoryview(data))}
    for index, array in enumerate(arrays):
        one = found[f"t{index}"]
        assert data[one.start : one.start + one.length] == array.tobytes()
        assert one.width == array.itemsize


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_any_bytes_have_regions_inside_them_or_none(data: bytes, magic: bool) -> None:
    content = data[:4] + b"TFL3" + data[4:] if magic else data
    assert inside(find_regions(memoryview(content)), len(content))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_spoilt_model_has_regions_inside_it_or_none(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray(model({"a": np.zeros(64, np.float32)}, tmp_path_factory.getbasetemp() / "m").read_bytes())
    for _ in range(chance.randrange(1, 5)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    assert inside(find_regions(memoryview(bytes(content))), len(content))


def inside(regions: list[Region], size: int) -> bool:
    end = 0
    for one in regions:
        if one.start < end or one.length % one.width:
            return False
        end = one.start + one.length
    return end <= size
