"""Rewrites before quantizers: what they make answers as before, and what they must leave alone stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps import litert_quantize
from converters.steps.litert_half import widen_constants
from converters.steps.litert_share import share_vectors
from converters.steps.litert_signature import add_signature
from converters.steps.onnx_pooling import pool_means
from converters.steps.onnx_static import prepare, static_int8
from converters.steps.onnx_weight_only import split_gemms, weight_only

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    *,
    taken: list[Any],
    given: list[Any] | None,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, taken)],
        [helper.make_tensor_value_info("y", kind, given)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def mean(axes: list[int] | None, *, keepdims: int, opset: int, **changed: Any) -> onnx.ModelProto:
    plain: dict[str, Any] = {"taken": ["n", 3, 5, 4], "given": None}
    weights: dict[str, np.ndarray] = {}
    if axes is None:
        node = helper.make_node("ReduceMean", ["x"], ["y"], name="m", keepdims=keepdims)
    elif opset < 18:
        node = helper.make_node("ReduceMean", ["x"], ["y"], name="m", axes=axes, keepdims=keepdims)
    else:
        weights["axes"] = np.array(axes, np.int64)
        node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="m", keepdims=keepdims)
    return model_of([node], weights, opset=opset, **{**plain, **changed})


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [2, -1]])
def test_a_mean_over_pixels_becomes_pooling(opset: int, keepdims: int, axes: list[int]) -> None:
    model = mean(axes, keepdims=keepdims, opset=opset)
    x = RNG.standard_normal((6, 3, 5, 4)).astype(np.float32)
    before = run(model, x)
    assert pool_means(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == Counter(["GlobalAveragePool", *([] if keepdims else ["Flatten"])])
    after = run(model, x)
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_axes_may_be_a_constant_node() -> None:
    axes = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([2, 3]), "v"))
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    model = model_of([axes, node], {}, taken=["n", 3, 5, 4], given=None, opset=18)
    assert pool_means(model) == 1


@pytest.mark.parametrize(
    "model",
    [
        mean([1, 2], keepdims=1, opset=17),
        mean([1, 2, 3], keepdims=1, opset=17),
        mean([3], keepdims=0, opset=18),
        mean(None, keepdims=1, opset=17),
        mean([1, 2], keepdims=0, opset=17, taken=["n", 3, 5]),
        mean([2, 3], keepdims=0, opset=17, taken=["n", 3, 5, 4, 2]),
        mean([2, 3], keepdims=1, opset=17, kind=TensorProto.INT32),
    ],
)
def test_other_means_are_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert pool_means(model) == 0
    assert model.SerializeToString() == before


def test_axes_that_are_computed_are_left_alone() -> None:
    nodes = [
        helper.make_node("Add", ["one", "one"], ["axes"]),
        helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
    ]
    model = model_of(nodes, {"one": np.array([1], np.int64)}, taken=["n", 3, 5, 4], given=None, opset=18)
    assert pool_means(model) == 0


def test_the_mean_of_a_static_net_stays_in_integers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("ReduceMean", ["c"], ["m"], name="mean", axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["m", "v"], ["y"], name="gemm"),
    ]
    weights = {
        "w": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "v": RNG.standard_normal((8, 4)).astype(np.float32),
    }
    onnx.save(model_of(nodes, weights, taken=["n", 3, 8, 8], given=["n", 4]), str(tmp_path / "m.onnx"))
    rows = RNG.standard_normal((16, 3, 8, 8)).astype(np.float32)
    context, found = Context(tmp_path, Dataset({"x": rows}, None, 16)), dict[str, Parameter]()
    prepare(tmp_path / "m.onnx", tmp_path / "p.onnx", context, {}, found)
    assert found == {"means_pooled": 1}
    parameters: dict[str, Parameter] = {"calibration": "MinMax", "activations": "uint8", "weight_bits": 8}
    static_int8(tmp_path / "p.onnx", tmp_path / "q.onnx", context, parameters, {})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    seen = operators(onnx.load(str(tmp_path / "seen.onnx")))
    assert seen["QLinearGlobalAveragePool"] == 1
    assert seen["QuantizeLinear"] == seen["DequantizeLinear"] == 1, "only the net's own input and output"


def gemm(*, turned: bool, bias: bool, **attributes: Any) -> onnx.ModelProto:
    weight = RNG.standard_normal((32, 64) if turned else (64, 32)).astype(np.float32)
    weights = {"w": weight, **({"b": RNG.standard_normal(32).astype(np.float32)} if bias else {})}
    node = helper.make_node(
        "Gemm", ["x", "w", *(["b"] if bias else [])], ["y"], name="g", transB=int(turned), **attributes
    )
    return model_of([node], weights, taken=["n", 64], given=["n", 32])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_gemm_gets_weights_in_blocks(tmp_path: Path, turned: bool, bias: bool, bits: int) -> None:
    model = gemm(turned=turned, bias=bias)
    onnx.save(model, str(tmp_path / "m.onnx"))
    found: dict[str, Parameter] = {}
    weight_only(tmp_path / "m.onnx", tmp_path / "q.onnx", Context(tmp_path, None), {"bits": bits, "block": 32}, found)
    assert found == {"changed": 1, "of_gemm": 1}
    made = onnx.load(str(tmp_path / "q.onnx"))
    assert operators(made) == Counter(["MatMulNBits", *(["Add"] if bias else [])])
    assert not any(list(tensor.dims) in ([32, 64], [64, 32]) for tensor in made.graph.initializer)
    x = RNG.standard_normal((9, 64)).astype(np.float32)
    before, after = run(model, x), run(made, x)
    assert 1 - ((after - before) ** 2).sum() / before.var() / before.size > (0.999 if bits == 8 else 0.97)


def test_a_split_gemm_answers_as_before_and_keeps_what_others_read() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="one", transB=1),
        helper.make_node("Gemm", ["h", "w"], ["i"], name="two", transB=1),
        helper.make_node("MatMul", ["i", "w"], ["y"], name="three"),
    ]
    weights = {"w": RNG.standard_normal((8, 8)).astype(np.float32), "b": RNG.standard_normal((1, 8)).astype(np.float32)}
    model = model_of(nodes, weights, taken=["n", 8], given=["n", 8])
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    before = run(model, x)
    assert split_gemms(model) == 2
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == {"MatMul": 3, "Add": 1}
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_gemms_that_are_more_than_a_product_are_left_alone(attributes: dict[str, Any]) -> None:
    model = gemm(turned=False, bias=True)
    model.graph.node[0].attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    before = model.SerializeToString()
    assert split_gemms(model) == 0
    assert model.SerializeToString() == before


def halved(path: Path) -> None:
    """A TFLite file as of 2020, of one convolution whose weights are float16 behind DEQUANTIZE."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description, model.buffers = 3, "half", [schema.BufferT()]
    graph.tensors, graph.operators, graph.name = [], [], "main"

    def tensor(name: str, shape: list[int], kind: int, data: np.ndarray | None = None) -> int:
        one = schema.TensorT()
        one.name, one.shape, one.type, one.buffer = name, shape, kind, 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            one.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(one)
        return len(graph.tensors) - 1

    def operator(code: int, inputs: list[int], outputs: list[int], options: Any = None, kind: int = 0) -> None:
        one = schema.OperatorT()
        one.opcodeIndex, one.inputs, one.outputs = code, inputs, outputs
        one.builtinOptions, one.builtinOptionsType = options, kind
        graph.operators.append(one)

    half, full = schema.TensorType.FLOAT16, schema.TensorType.FLOAT32
    model.operatorCodes = []
    for code in (schema.BuiltinOperator.DEQUANTIZE, schema.BuiltinOperator.CONV_2D):
        one = schema.OperatorCodeT()
        one.builtinCode, one.deprecatedBuiltinCode, one.version = 0, code, 3
        model.operatorCodes.append(one)
    x = tensor("x", [1, 8, 8, 3], full)
    weight = tensor("w16", [4, 3, 3, 3], half, RNG.standard_normal((4, 3, 3, 3)).astype("<f2"))
    bias = tensor("b16", [4], half, RNG.standard_normal(4).astype("<f2"))
    wide_weight, wide_bias = tensor("w", [4, 3, 3, 3], full), tensor("b", [4], full)
    y = tensor("y", [1, 8, 8, 4], full)
    options = schema.Conv2DOptionsT()
    options.strideH = options.strideW = options.dilationHFactor = options.dilationWFactor = 1
    operator(0, [weight], [wide_weight])
    operator(0, [bias], [wide_bias])
    operator(1, [x, wide_weight, wide_bias], [y], options, schema.BuiltinOptions.Conv2DOptions)
    graph.inputs, graph.outputs = [x], [y]
    model.subgraphs = [graph]
    flatbuffer_utils.write_model(model, str(path))


def litert_answer(path: Path, x: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def test_half_constants_become_full_ones_exactly(tmp_path: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    halved(tmp_path / "m.tflite")
    found: dict[str, Parameter] = {}
    widen_constants(tmp_path / "m.tflite", tmp_path / "w.tflite", Context(tmp_path, None), {}, found)
    assert found == {"widened": 2}
    model = flatbuffer_utils.read_model(str(tmp_path / "w.tflite"))
    assert len(model.subgraphs[0].operators) == 1
    sizes = sorted(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    assert sizes == [4 * 4, 4 * 27 * 4], "the float16 numbers are gone"
    x = RNG.standard_normal((1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(litert_answer(tmp_path / "w.tflite", x), litert_answer(tmp_path / "m.tflite", x))
    again: dict[str, Parameter] = {}
    widen_constants(tmp_path / "w.tflite", tmp_path / "again.tflite", Context(tmp_path, None), {}, again)
    assert again == {}
    assert (tmp_path / "again.tflite").read_bytes() == (tmp_path / "w.tflite").read_bytes()


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
@pytest.mark.parametrize("recipe", ["static_wi8_ai8", "dynamic_wi8_afp32", "weight_only_wi8_afp32"])
def test_old_files_in_half_precision_get_8_bits(tmp_path: Path, recipe: str) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    halved(tmp_path / "m.tflite")
    rows = RNG.standard_normal((16, 8, 8, 3)).astype(np.float32)
    context, found = Context(tmp_path, Dataset({"x": rows}, None, 16)), dict[str, Parameter]()
    add_signature(tmp_path / "m.tflite", tmp_path / "s.tflite", context, {}, found)
    assert found == {"added": True, "codes": 2}
    widen_constants(tmp_path / "s.tflite", tmp_path / "w.tflite", context, {}, {})
    run_step = litert_quantize.static if recipe.startswith("static") else litert_quantize.without_calibration
    run_step(tmp_path / "w.tflite", tmp_path / "q.tflite", context, {"recipe": recipe}, {})
    model = flatbuffer_utils.read_model(str(tmp_path / "q.tflite"))
    names = {tensor.name: flatbuffer_utils.type_to_name(tensor.type) for tensor in model.subgraphs[0].tensors}
    assert names[b"w"] == "INT8"
    again: dict[str, Parameter] = {}
    add_signature(tmp_path / "s.tflite", tmp_path / "again.tflite", context, {}, again)
    assert again == {}


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Input model is already partially quantized:UserWarning")
def test_a_net_in_integers_is_called_what_it_is(tmp_path: Path) -> None:
    """The quantizer leaves it as it was, whatever is asked for."""
    halved(tmp_path / "m.tflite")
    rows = RNG.standard_normal((16, 8, 8, 3)).astype(np.float32)
    context = Context(tmp_path, Dataset({"x": rows}, None, 16))
    add_signature(tmp_path / "m.tflite", tmp_path / "s.tflite", context, {}, {})
    widen_constants(tmp_path / "s.tflite", tmp_path / "w.tflite", context, {}, {})
    litert_quantize.static(tmp_path / "w.tflite", tmp_path / "q.tflite", context, {"recipe": "static_wi8_ai8"}, {})
    whole = Context(tmp_path, Dataset({"x": (rows * 50).astype(np.int8)}, None, 16))
    litert_quantize.static(tmp_path / "q.tflite", tmp_path / "again.tflite", whole, {"recipe": "static_wi8_ai8"}, {})
    for run_step, recipe in (
        (litert_quantize.static, "static_wi8_ai16"),
        (litert_quantize.without_calibration, "dynamic_wi8_afp32"),
        (litert_quantize.without_calibration, "weight_only_wi8_afp32"),
        (litert_quantize.without_calibration, "weight_only_wi4_afp32"),
    ):
        with pytest.raises(ConversionError, match="in integers already: fp32 is the file as it is") as caught:
            run_step(tmp_path / "q.tflite", tmp_path / "other.tflite", whole, {"recipe": recipe}, {})
        assert caught.value.code == "nothing_to_do", recipe


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    halved(tmp_path / "m.tflite")
    model = flatbuffer_utils.read_model(str(tmp_path / "m.tflite"))
    buffer = model.buffers[model.subgraphs[0].tensors[1].buffer]
    buffer.data = np.frombuffer(np.full(4 * 27, np.nan, "<f2").tobytes(), np.uint8)
    flatbuffer_utils.write_model(model, str(tmp_path / "m.tflite"))
    context = Context(tmp_path, Dataset({"x": np.zeros((2, 8, 8, 3), np.float32)}, None, 2))
    add_signature(tmp_path / "m.tflite", tmp_path / "s.tflite", context, {}, {})
    widen_constants(tmp_path / "s.tflite", tmp_path / "w.tflite", context, {}, {})
    for run_step, recipe in (
        (litert_quantize.static, "static_wi8_ai8"),
        (litert_quantize.without_calibration, "dynamic_wi8_afp32"),
    ):
        with pytest.raises(ConversionError, match="the weight 'w' holds NaN or infinity") as caught:
            run_step(tmp_path / "w.tflite", tmp_path / "q.tflite", context, {"recipe": recipe}, {})
        assert caught.value.code == "weights_not_finite"


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
def test_equal_lists_are_written_once_and_weights_stay_aligned(tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    halved(tmp_path / "m.tflite")
    rows = RNG.standard_normal((16, 8, 8, 3)).astype(np.float32)
    context, found = Context(tmp_path, Dataset({"x": rows}, None, 16)), dict[str, Parameter]()
    add_signature(tmp_path / "m.tflite", tmp_path / "s.tflite", context, {}, {})
    widen_constants(tmp_path / "s.tflite", tmp_path / "w.tflite", context, {}, {})
    litert_quantize.static(tmp_path / "w.tflite", tmp_path / "q.tflite", context, {"recipe": "static_wi8_ai8"}, {})
    share_vectors(tmp_path / "q.tflite", tmp_path / "shared.tflite", context, {}, found)
    assert int(found["shared"] or 0) > 0
    row = RNG.integers(-128, 128, (1, 8, 8, 3), dtype=np.int8)
    answers = [litert_answer(tmp_path / name, row) for name in ("q.tflite", "shared.tflite")]
    np.testing.assert_array_equal(*answers)
    model = schema.Model.GetRootAsModel((tmp_path / "shared.tflite").read_bytes(), 0)
    buffers = [model.Buffers(index) for index in range(model.BuffersLength())]
    starts = [one._tab.Vector(one._tab.Offset(4)) for one in buffers if one.DataLength()]
    assert starts
    assert not [start for start in starts if start % 16]


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
@pytest.mark.parametrize("recurrent", [True, False])
def test_why_recurrent_nets_get_no_static_int8_is_said(tmp_path: Path, recurrent: bool) -> None:
    """A tensor that holds nothing after a run, which is what the calibrator stumbles over in them."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    halved(tmp_path / "m.tflite")
    context = Context(tmp_path, Dataset({"x": RNG.standard_normal((4, 8, 8, 3)).astype(np.float32)}, None, 4))
    add_signature(tmp_path / "m.tflite", tmp_path / "s.tflite", context, {}, {})
    widen_constants(tmp_path / "s.tflite", tmp_path / "w.tflite", context, {}, {})
    model = flatbuffer_utils.read_model(str(tmp_path / "w.tflite"))
    state, code = schema.TensorT(), schema.OperatorCodeT()
    state.name, state.shape, state.type, state.buffer = "state", [1, 4], schema.TensorType.FLOAT32, 0
    model.subgraphs[0].tensors.append(state)
    if recurrent:
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.WHILE
        code.version = 1
        model.operatorCodes.append(code)
    flatbuffer_utils.write_model(model, str(tmp_path / "l.tflite"))
    with pytest.raises(ConversionError if recurrent else ValueError, match="data is null") as raised:
        litert_quantize.static(tmp_path / "l.tflite", tmp_path / "q.tflite", context, {"recipe": "static_wi8_ai8"}, {})
    if recurrent:
        assert isinstance(raised.value, ConversionError)
        assert raised.value.code == "not_quantizable"
        assert "WHILE" in raised.value.detail
        assert "dynamic-int8" in raised.value.detail
