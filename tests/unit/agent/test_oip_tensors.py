"""Tensors of requests: what is refused, with the field's name, and that whatever comes is decoded or refused."""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.manifest import Manifest, TensorSpec
from agent.runtimes.base import numpy_dtype
from agent.serving import oip, tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.classification import top_classes
from agent.serving.encodings import EncodingError, chosen, compress, expand
from agent.serving.oip import decode_request, encode_response
from agent.serving.tensors import DATATYPES
from tests.serving_worker import described

DTYPES = sorted(set(DATATYPES.values()))


def model(dtype: str) -> Manifest:
    return described("m", (TensorSpec("x", dtype, (-1, 2)),), (TensorSpec("y", dtype, (-1, 2)),))


def body(dtype: str, data: Any, shape: Any = (1, 2), **more: Any) -> bytes:
    name = next(kind for kind, numpy in DATATYPES.items() if numpy == dtype)
    return json.dumps({"inputs": [{"name": "x", "datatype": name, "shape": shape, "data": data}], **more}).encode()


@pytest.mark.parametrize(
    ("dtype", "data", "said"),
    [
        ("int64", [1.5, 2], "Expected `int`, got `float`"),
        ("int64", [2**63, 0], "input 'x'"),
        ("int64", [True, 0], "got `bool`"),
        ("uint8", [256, 0], "<= 255"),
        ("uint8", [-1, 0], ">= 0"),
        ("uint64", [2**64, 0], "input 'x'"),
        ("uint64", [-1, 0], ">= 0"),
        ("int8", [-129, 0], ">= -128"),
        ("bool", [1, 0], "Expected `bool`, got `int`"),
        ("float32", ["1", "2"], "got `str`"),
        ("float32", [None, 1], "got `null`"),
        ("float32", [1e39, 0], "overflow"),
        ("float16", [70000, 0], "overflow"),
        ("string", [1, "a"], "Expected `str`, got `int`"),
        ("float32", [[1], [2]], "it has shape"),
        ("float32", [[1, 2], []], "does not fill"),
        ("float32", [[[1, 2]]], "nested 3 deep"),
        ("float32", [1, 2, 3], "it has 3 values, and 2 are taken"),
        ("string", ["a"], "it has shape"),
        ("string", [["a"], ["b"]], "it has shape"),
        ("string", ["a", ["b"]], "Expected `str`, got `array`"),
    ],
)
def test_values_of_another_kind_are_refused(dtype: str, data: Any, said: str) -> None:
    with pytest.raises(BadRequestError, match=said) as refused:
        decode_request(body(dtype, data), None, model(dtype))
    assert "'x'" in str(refused.value)
    assert refused.value.field == ("inputs", "x", "data")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"inputs": []}, ("inputs", "x")),
        ({"inputs": [{"name": "z", "datatype": "FP32", "shape": [1, 2], "data": []}]}, ("inputs", "z")),
        ({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 2], "data": []}]}, ("inputs", "x", "datatype")),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": []}]}, ("inputs", "x", "shape")),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": ["1"], "data": []}]}, ("inputs", "0", "shape", "0")),
        ({"inputs": {}}, ("inputs",)),
        ({"id": []}, ("id",)),
        ({"parameters": {"priority": 101}}, ("parameters", "priority")),
        ({"parameters": {"timeout": -1}}, ("parameters", "timeout")),
        ({"outputs": [{"name": "z"}]}, ("outputs", "z")),
        (
            {"outputs": [{"name": "y", "parameters": {"classification": -1}}]},
            ("outputs", "y", "parameters", "classification"),
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}]},
            ("outputs", "y", "parameters", "shared_memory_region"),
        ),
    ],
)
def test_the_field_at_fault_is_named_for_programs(change: dict[str, Any], field: tuple[str, ...]) -> None:
    with pytest.raises(BadRequestError) as refused:
        decode_request(body("float32", [1, 2], **change), None, model("float32"))
    assert refused.value.field == field


@pytest.mark.parametrize(
    "text", ["[NaN, 0]", "[Infinity, 0]", "[-Infinity, 0]", "[1e400, 0]", "[01, 0]", "[1, 2", "[" * 99999]
)
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_what_json_has_no_word_for(dtype: str, text: str) -> None:
    whole = body(dtype, "DATA").replace(b'"DATA"', text.encode())
    with pytest.raises(BadRequestError):
        decode_request(whole, None, model(dtype))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": []}, "x is missing"),
        ({"inputs": 3}, r"Expected `array`, got `int` - at `\$.inputs`"),
        ({"id": "a" * 257}, r"\$.id"),
        ({"parameters": {"priority": "high"}}, r"\$.parameters.priority"),
        ({"outputs": [{"name": "z"}]}, "no output 'z', but y"),
        ({"outputs": [{"name": "y", "parameters": {"classification": -1}}]}, "how many classes"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 10**6}}]}, "how many classes"),
        ({"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}, "no part of a region"),
    ],
)
def test_fields_of_the_request_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        decode_request(body("float32", [1, 2], **change), None, model("float32"))


def test_an_input_comes_once_and_one_way() -> None:
    one = json.loads(body("float32", [1, 2]))["inputs"][0]
    with pytest.raises(BadRequestError, match="'x' is there twice"):
        decode_request(json.dumps({"inputs": [one, one]}).encode(), None, model("float32"))
    for parameters in ({"binary_data_size": 8}, {"shared_memory_region": "r", "shared_memory_byte_size": 8}):
        header = json.dumps({"inputs": [{**one, "parameters": parameters}]}).encode()
        with pytest.raises(BadRequestError, match="comes by one of"):
            decode_request(header + bytes(8), len(header), model("float32"))


def test_shared_memory_is_not_for_who_is_far_away() -> None:
    header = json.loads(body("float32", None))
    header["inputs"][0]["parameters"] = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    with pytest.raises(BadRequestError, match="programs on this device alone"):
        decode_request(json.dumps(header).encode(), None, model("float32"))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "ends after 0 of 2"),
        (b"\1\0\0\0a", "ends after 1 of 2"),
        (b"\1\0\0\0a\xff\xff\xff\xffb", "string 1 is said to be longer"),
        (b"\1\0\0\0\xff\0\0\0\0", "string 0 is not UTF-8"),
        (b"\0\0\0\0\0\0\0\0x", "1 bytes follow the last of 2"),
    ],
)
def test_strings_that_are_none(raw: bytes, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        tensors.from_binary(TensorSpec("x", "string", (-1, 2)), raw, [1, 2])


def test_no_shape_makes_more_than_came() -> None:
    for dtype in ("float32", "string"):
        spec = TensorSpec("x", dtype, (-1, 2))
        for make in (
            lambda shape, spec=spec: tensors.from_json(spec, b"[]", shape),
            lambda shape, spec=spec: tensors.from_binary(spec, b"", shape),
        ):
            with pytest.raises(BadRequestError, match="'x'"):
                make([10**9, 2])


def test_json_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip, "JSON_LIMIT", 50)
    with pytest.raises(BadRequestError, match="send binary tensors"):
        decode_request(body("float32", [1, 2]), None, model("float32"))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.just("x") | ANY, "datatype": st.sampled_from(sorted(DATATYPES)) | ANY},
    optional={
        "shape": st.lists(st.integers(-1, 4), max_size=3) | st.just([1, 2]) | ANY,
        "data": st.lists(st.integers(-300, 300) | st.booleans() | st.text(max_size=3), max_size=6) | ANY,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "shared_memory_byte_size", "classification"]),
            st.integers(-9, 99) | ANY,
        ),
    },
)


@settings(max_examples=400, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    inputs=st.lists(TENSOR, max_size=3) | ANY,
    outputs=st.lists(st.fixed_dictionaries({"name": st.just("y") | ANY}, optional={"parameters": ANY}), max_size=2)
    | ANY,
    parameters=ANY,
    tail=st.binary(max_size=40),
    cut=st.none() | st.integers(-3, 300),
)
def test_whatever_comes_is_decoded_or_refused(
    dtype: str, inputs: Any, outputs: Any, parameters: Any, tail: bytes, cut: int | None
) -> None:
    header = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()
    for length in (None, len(header), cut):
        with contextlib.suppress(BadRequestError):
            found = decode_request(header + tail, length, model(dtype))
            assert found.inputs["x"].dtype == numpy_dtype(dtype)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, Any]:
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.integers(1, 4))
    if dtype == "string":
        elements: st.SearchStrategy[Any] = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    elif dtype == "bool":
        elements = st.booleans()
    elif np.dtype(dtype).kind == "f":
        elements = st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]
    else:
        info = np.iinfo(dtype)
        elements = st.integers(int(info.min), int(info.max))
    values = draw(st.lists(elements, min_size=rows * 2, max_size=rows * 2))
    return dtype, np.array(values, numpy_dtype(dtype)).reshape(rows, 2)


@settings(max_examples=300, deadline=None)
@given(case=arrays(), nested=st.booleans(), binary_in=st.booleans(), binary_out=st.booleans())
def test_what_fits_comes_out_as_it_went_in(
    case: tuple[str, Any], nested: bool, binary_in: bool, binary_out: bool
) -> None:
    dtype, array = case
    header = json.loads(body(dtype, None, list(array.shape), parameters={"binary_data_output": binary_out}))
    blob = b""
    if binary_in:
        blob = tensors.to_binary(array)
        header["inputs"][0]["parameters"] = {"binary_data_size": len(blob)}
    else:
        header["inputs"][0]["data"] = array.tolist() if nested else array.reshape(-1).tolist()
    encoded = json.dumps(header).encode()
    request = decode_request(encoded + blob, len(encoded), model(dtype))
    assert request.inputs["x"].tolist() == array.tolist()
    answer, length = encode_response(request, {"y": request.inputs["x"]}, model(dtype))
    said = json.loads(answer[:length])["outputs"][0]
    if binary_out:
        assert length is not None
        back = tensors.from_binary(TensorSpec("y", dtype, (-1, 2)), answer[length:], said["shape"])
    else:
        back = tensors.from_json(TensorSpec("y", dtype, (-1, 2)), json.dumps(said["data"]).encode(), said["shape"])
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("binary", [True, False])
def test_a_scalar_is_answered_as_one(binary: bool) -> None:
    """Its shape is empty, as that which the model says it has."""
    manifest = described("m", (TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", ()),))
    request = decode_request(body("float32", [1, 2], parameters={"binary_data_output": binary}), None, manifest)
    answer, length = encode_response(request, {"y": np.array(0.5, np.float32)}, manifest)
    output = json.loads(answer[:length])["outputs"][0]
    assert output["shape"] == []
    assert answer[length:] == np.float32(0.5).tobytes() if binary else output["data"] == [0.5]


def test_the_largest_come_first_and_of_equals_the_first() -> None:
    scores = np.array([[1, 3, 3, math.nan], [0, 0, 0, 0]], np.float32)
    assert top_classes(scores, 9, ("a", "b")).tolist() == [
        ["3.000000:1:b", "3.000000:2", "1.000000:0:a", "nan:3"],
        ["0.000000:0:a", "0.000000:1:b", "0.000000:2", "0.000000:3"],
    ]
    assert top_classes(np.array([7, 255, 7], np.uint8), 2, ()).tolist() == ["255:1", "7:0"]
    assert top_classes(np.zeros((2, 2, 2), np.int64), 1, ()).tolist() == [["0:0"], ["0:0"]]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_small_body_that_is_a_large_one_is_not_expanded(encoding: str) -> None:
    assert expand(compress(b"a" * 1000, encoding), encoding, 1000) == b"a" * 1000
    with pytest.raises(EncodingError, match="may have 1000 bytes") as large:
        expand(compress(b"a" * 50_000_000, encoding), encoding, 1000)
    assert large.value.status == 413
    for damaged in (b"no", compress(b"abc", encoding)[:-1], compress(b"abc", encoding) + b"x"):
        with pytest.raises(EncodingError, match=f"no (whole )?{encoding}"):
            expand(damaged, encoding, 1000)
    with pytest.raises(EncodingError, match="'br' is not taken"):
        expand(zlib.compress(b""), "br", 1000)


def test_how_an_answer_is_compressed() -> None:
    assert chosen("br, gzip;q=0, deflate;q=0.5") == "deflate"
    assert chosen("GZIP") == "gzip"
    assert chosen("identity, *;q=0") is None
