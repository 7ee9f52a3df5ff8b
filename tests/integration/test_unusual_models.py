"""Nets as strangers' packages have them: each converts and answers as its source does, or says what would help."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from agent.runtimes import open_runtime
from agent.runtimes.base import reason
from converters import evaluate
from converters.errors import ConversionError
from converters.evaluate import Answers, fidelity
from converters.inspection import inspect
from converters.isolate import isolated
from converters.job import BuildJob, BuildResult, Candidate, DataFile, InspectJob, SourceFile, Target
from converters.package import manifest_for
from converters.pipeline import build
from converters.steps.onnx_tidy import tidied

ROWS = 12
TARGET = Target("p", RuntimeName.ONNX, ("cpu",), tuple(Precision), accuracy_drop_points=5.0)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
value = helper.make_tensor_value_info
node = helper.make_node
rng = np.random.default_rng(0)


def weight(name: str, *shape: int, dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array((rng.standard_normal(shape) * 0.4).astype(dtype), name)


def const(name: str, content: Any) -> Any:
    return numpy_helper.from_array(np.asarray(content), name)


def net(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], **options: Any) -> Any:
    domains = [helper.make_opsetid("", options.get("opset", 17)), *options.get("domains", [])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=domains, functions=options.get("functions", []))
    model.ir_version = options.get("ir", 8)
    return model


def linear(**options: Any) -> Any:
    """A matrix product of `x` (rows, 16); `dtype`, `shape_in` and `shape_out` where it is unusual."""
    dtype = options.get("dtype", FLOAT)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    return net(
        options.get("nodes", [node("MatMul", ["x", "w"], ["y"])]),
        [value("x", dtype, options.get("shape_in", ["n", 16])), *options.get("inputs", [])],
        [value("y", dtype, options.get("shape_out", ["n", 5])), *options.get("outputs", [])],
        [weight("w", 16, 5, dtype=kind), *options.get("weights", [])],
        **{name: options[name] for name in ("opset", "ir", "domains", "functions") if name in options},
    )


def recurrent(kind: str, opset: int) -> Any:
    gates = {"LSTM": 4, "GRU": 3}[kind]
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    axes = {"axes": [0]} if opset < 13 else {}
    return net(
        [
            node(kind, ["x", "W", "R", "", "", *states], ["all", *(f"{one}_next" for one in states)], hidden_size=8),
            node("Squeeze", ["h_next", *([] if axes else ["axes"])], ["last"], **axes),
            node("MatMul", ["last", "out"], ["y"]),
        ],
        [value("x", FLOAT, ["time", 1, 6]), *(value(one, FLOAT, [1, 1, 8]) for one in states)],
        [value("y", FLOAT, [1, 4]), *(value(f"{one}_next", FLOAT, [1, 1, 8]) for one in states)],
        [
            weight("W", 1, gates * 8, 6),
            weight("R", 1, gates * 8, 8),
            weight("out", 8, 4),
            *([] if axes else [const("axes", np.array([0]))]),
        ],
        opset=opset,
    )


def convolution(opset: int) -> Any:
    """With its weights among the inputs, as files had them before 2019."""
    shapes = {"w": [8, 3, 3, 3], "s": [8], "b": [8], "m": [8]}
    return net(
        [
            node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["a", "s", "b", "m", "v"], ["normal"]),
            node("Relu", ["normal"], ["r"]),
            node("GlobalAveragePool", ["r"], ["pooled"]),
            node("Flatten", ["pooled"], ["y"]),
        ],
        [value("x", FLOAT, ["n", 3, 12, 12]), *(value(name, FLOAT, shape) for name, shape in shapes.items())],
        [value("y", FLOAT, ["n", 8])],
        [*(weight(name, *shape) for name, shape in shapes.items()), const("v", np.ones(8, np.float32))],
        opset=opset,
        ir=3,
    )


def with_function() -> Any:
    body = [node("MatMul", ["a", "b"], ["m"]), node("Relu", ["m"], ["o"])]
    function = helper.make_function("own", "Layer", ["a", "b"], ["o"], body, [helper.make_opsetid("", 17)])
    nodes = [node("Layer", ["x", "w"], ["y"], domain="own")]
    return linear(nodes=nodes, functions=[function], domains=[helper.make_opsetid("own", 1)])


def branches(dtype: int = FLOAT) -> Any:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    left = helper.make_graph([node("MatMul", ["x", "w"], ["l"])], "left", [], [value("l", dtype, None)])
    right = helper.make_graph([node("MatMul", ["x", "v"], ["r"])], "right", [], [value("r", dtype, None)])
    return linear(
        dtype=dtype,
        nodes=[node("Equal", ["rate", "wide"], ["is"]), node("If", ["is"], ["y"], then_branch=left, else_branch=right)],
        inputs=[value("rate", INT64, [])],
        weights=[weight("v", 16, 5, dtype=kind), const("wide", np.int64(16000))],
    )


def loop() -> Any:
    inner = helper.make_graph(
        [node("MatMul", ["v", "sq"], ["m"]), node("Tanh", ["m"], ["next"]), node("Identity", ["go"], ["on"])],
        "body",
        [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("v", FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", FLOAT, None)],
    )
    nodes = [node("Loop", ["trips", "", "x"], ["z"], body=inner), node("MatMul", ["z", "w"], ["y"])]
    return linear(nodes=nodes, inputs=[value("trips", INT64, [])], weights=[weight("sq", 16, 16)])


def masked() -> Any:
    nodes = [
        node("Where", ["mask", "x", "least"], ["m"]),
        node("Softmax", ["m"], ["p"]),
        node("MatMul", ["p", "w"], ["y"]),
    ]
    return linear(
        nodes=nodes,
        inputs=[value("mask", TensorProto.BOOL, ["n", 16])],
        weights=[const("least", np.float32(-np.inf))],
    )


def trees(*versions: int) -> Any:
    """A stump, without a standard operator; `versions` of those are declared all the same."""
    stump = node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[3, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.1, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        target_treeids=[0, 0],
        target_nodeids=[1, 2],
        target_ids=[0, 0],
        target_weights=[-1.5, 2.5],
    )
    model = net([stump], [value("x", FLOAT, ["n", 16])], [value("y", FLOAT, ["n", 1])], [])
    del model.opset_import[:]
    opsets = [("ai.onnx.ml", 1), *(("", version) for version in versions)]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets)
    return model


def scaled() -> Any:
    """A net behind an operator whose answers' dtype is not told by ONNX's shape inference."""
    nodes = [
        node("Scaler", ["x"], ["scaled"], domain="ai.onnx.ml", offset=[0.5], scale=[2.0]),
        node("MatMul", ["scaled", "w"], ["scores"]),
        node("Softmax", ["scores"], ["p"]),
        node("Identity", ["p"], ["y"]),
    ]
    return linear(nodes=nodes, domains=[helper.make_opsetid("ai.onnx.ml", 1)])


USUAL: dict[str, Callable[[], Any]] = {
    "function": with_function,
    "declared domain": lambda: linear(domains=[helper.make_opsetid("never.used", 1)]),
    "weights in nodes": lambda: net(
        [node("Constant", [], ["w"], value=weight("", 16, 5)), node("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, ["n", 16])], [value("y", FLOAT, ["n", 5])], [],
    ),
    "weights among inputs": lambda: convolution(11),
    "weights cast": lambda: linear(
        nodes=[node("Cast", ["h"], ["f"], to=FLOAT), node("MatMul", ["x", "f"], ["y"])],
        weights=[weight("h", 16, 5, dtype=np.float16)],
    ),
    "a weight is an answer": lambda: linear(outputs=[value("w", FLOAT, [16, 5])]),
    "an input is an answer": lambda: linear(outputs=[value("x", FLOAT, ["n", 16])]),
    "half": lambda: linear(dtype=TensorProto.FLOAT16),
    "half branches": lambda: branches(TensorProto.FLOAT16),
    "double": lambda: linear(dtype=TensorProto.DOUBLE),
    "double choice": lambda: linear(
        dtype=TensorProto.DOUBLE, nodes=[node("MatMul", ["x", "w"], ["s"]), node("Softmax", ["s"], ["y"])]
    ),
    "trees": trees,
    "trees, and operators declared twice": lambda: trees(22, 22),
    "scaled": scaled,
    "branches": branches,
    "loop": loop,
    "infinite mask": masked,
    "names": lambda: net(
        [node("MatMul", ["in/put:0", "w eight"], ["out put é"])],
        [value("in/put:0", FLOAT, ["n", 16])], [value("out put é", FLOAT, ["n", 5])], [weight("w eight", 16, 5)],
    ),
    "one axis": lambda: linear(shape_in=[16], shape_out=[5]),
    "batch of four": lambda: linear(shape_in=[4, 16], shape_out=[4, 5]),
    "no shape out": lambda: linear(shape_out=None),
    "wrong shape out": lambda: linear(shape_out=["n", 9]),
    "lstm 11": lambda: recurrent("LSTM", 11),
    "gru 21": lambda: recurrent("GRU", 21),
    "negative sizes": lambda: linear(shape_in=[-1, 16], shape_out=[-1, 5]),
    "answers of any length": lambda: net(
        [node("NonZero", ["x"], ["y"])], [value("x", FLOAT, ["n", 16])], [value("y", INT64, [2, "k"])], [],
    ),
}  # fmt: skip


def saved(folder: Path, model: Any) -> tuple[SourceFile, ...]:
    onnx.save(model, str(folder / "m.onnx"))
    return (SourceFile(ModelFormat.ONNX, "0" * 64, str(folder / "m.onnx")),)


def rows_for(path: Path) -> dict[str, np.ndarray]:
    """Rows for every input: each a whole input, but where a first axis of all of them is free."""
    asked = onnxruntime.InferenceSession(str(path)).get_inputs()
    batched = all(one.shape and one.shape[0] in {"n", None} for one in asked)
    arrays = {}
    for one in asked:
        sizes = [size if isinstance(size, int) else 3 for size in one.shape[1 if batched else 0 :]]
        kind = {"float": np.float32, "float16": np.float16, "double": np.float64, "bool": bool, "int64": np.int64}
        dtype = np.dtype(kind[one.type[7:-1]])
        drawn = rng.standard_normal((ROWS, *sizes)) if dtype.kind == "f" else rng.integers(1, 3, (ROWS, *sizes))
        arrays[one.name] = drawn.astype(dtype)
    return arrays


def stored(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> DataFile:
    np.savez(folder / name, **arrays)  # type: ignore[arg-type]
    return DataFile("1" * 64, str(folder / name))


def built(
    folder: Path, model: Any, *, data: bool = True, target: Target = TARGET
) -> tuple[BuildResult, dict[str, Any]]:
    sources = saved(folder, model)
    arrays = rows_for(folder / "m.onnx") if data else {}
    rows = stored(folder, "rows.npz", arrays) if data else None
    (folder / "work").mkdir()
    inspect(InspectJob(sources, rows, rows), lambda _fraction, _step: None)
    return build(BuildJob(sources, target, rows, rows), folder / "work", lambda _fraction, _step: None), arrays


def check_answers(folder: Path, one: Candidate, arrays: dict[str, np.ndarray], *, exact: bool) -> None:
    """The device's runtime takes the file as its manifest says, and answers as the source does."""
    assert one.path is not None
    path = folder / "work" / one.path
    runtime = open_runtime(manifest_for(path, (one.inputs, one.outputs), ModelFormat.ONNX, TARGET), path)
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"))
    names = [out.name for out in session.get_outputs()]
    for row in range(3):
        feed = {
            spec.name: np.asarray(arrays[spec.name][row])[None]
            if arrays[spec.name].ndim == len(spec.shape)
            else np.asarray(arrays[spec.name][row])
            for spec in one.inputs
        }
        wanted = dict(zip(names, session.run(names, feed), strict=True))
        found = runtime.run(feed)
        for spec in one.outputs:
            got = found[spec.name]
            assert got.dtype == spec.dtype
            assert len(spec.shape) == got.ndim
            assert all(said in {-1, size} for said, size in zip(spec.shape, got.shape, strict=True))
            if exact:
                np.testing.assert_allclose(got, wanted[spec.name], rtol=1e-5, atol=1e-6)


NOT_IN_EVERY_PRECISION = {"an input is an answer", "double", "infinite mask"}


@pytest.mark.parametrize("name", USUAL)
def test_it_converts_and_answers_as_its_source_in_every_precision(tmp_path: Path, name: str) -> None:
    """Where a recipe finds nothing to do it says so; none fails in a library."""
    result, arrays = built(tmp_path, USUAL[name]())
    plain = result.candidates[0]
    assert plain.error is None
    assert plain.measurements is not None
    assert plain.measurements.agreement == 1.0
    assert plain.measurements.fidelity in {None, 1.0}
    assert result.chosen is not None
    assert result.candidates[result.chosen].fate == "picked"
    check_answers(tmp_path, plain, arrays, exact=True)
    check_answers(tmp_path, result.candidates[result.chosen], arrays, exact=False)
    for one in result.candidates:
        said = one.error or ""
        assert "ONNXRuntimeError" not in said, one.recipe
        assert str(tmp_path) not in said, one.recipe
        fine = not said or "nothing to do" in said or "already" in said or "no histogram" in said or "no layer" in said
        assert fine or name in NOT_IN_EVERY_PRECISION, f"{one.recipe}: {said}"


@pytest.mark.parametrize("opset", [11, 12, 13, 18, onnx.defs.onnx_opset_version()])
def test_int8_has_a_scale_a_channel_at_any_opset(tmp_path: Path, opset: int) -> None:
    result, _ = built(tmp_path, convolution(opset), target=Target("p", RuntimeName.ONNX, ("cpu",), (Precision.INT8,)))
    static = next(one for one in result.candidates if one.recipe == "onnx-static-u8s8")
    assert static.error is None
    assert static.path is not None
    scales = [
        numpy_helper.to_array(tensor).size
        for tensor in onnx.load(tmp_path / "work" / static.path).graph.initializer
        if tensor.name.endswith("_scale")
    ]
    assert 8 in scales


@pytest.mark.parametrize("model", [lambda: trees(17), linear])
def test_what_is_called_integers_or_half_has_some(tmp_path: Path, model: Callable[[], Any]) -> None:
    """A tool that finds nothing to do writes the net as it was, and of one layer those that hurt are the whole net."""
    result, _ = built(tmp_path, model(), target=msgspec.structs.replace(TARGET, accuracy_drop_points=0.0))
    for one in result.candidates:
        if one.path is None or one.precision is Precision.FP32:
            continue
        made = onnx.load(tmp_path / "work" / one.path)
        operators = {part.op_type for part in made.graph.node}
        halves = [tensor for tensor in made.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
        assert halves or operators & {"DequantizeLinear", "MatMulInteger", "MatMulNBits"}, one.recipe


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, number: float) -> None:
    """By every recipe that makes integers of them."""
    model = net(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])],
        [value("x", FLOAT, ["n", 16])],
        [value("y", FLOAT, ["n", 5])],
        [weight("w", 16, 8), const("v", np.array([[1, 2, 3, 4, number]] * 8, np.float32))],
    )
    result, _ = built(tmp_path, model)
    for one in result.candidates:
        if one.precision in {Precision.FP32, Precision.FP16} or "-sums-" in one.recipe:
            continue
        assert "the weight 'v' holds NaN or infinity" in (one.error or ""), one.recipe


def imputed(into: float) -> Any:
    """A net that gets a number in the place of what is missing."""
    nodes = [
        node(
            "Imputer", ["x"], ["whole"], domain="ai.onnx.ml", imputed_value_floats=[into], replaced_value_float=np.nan
        ),
        node("MatMul", ["whole", "w"], ["scores"]),
        node("Identity", ["scores"], ["y"]),
    ]
    return linear(nodes=nodes, domains=[helper.make_opsetid("ai.onnx.ml", 1)])


@pytest.mark.parametrize("model", [trees, lambda: imputed(0.5)])
def test_rows_may_miss_values_where_a_model_is_made_for_it(tmp_path: Path, model: Callable[[], Any]) -> None:
    sources = saved(tmp_path, model())
    rows = rng.standard_normal((ROWS, 16)).astype(np.float32)
    rows[::3, 3] = np.nan
    given = stored(tmp_path, "rows.npz", {"x": rows})
    (tmp_path / "work").mkdir()
    inspect(InspectJob(sources, given, given), lambda _fraction, _step: None)
    target = msgspec.structs.replace(TARGET, precisions=(Precision.FP32, Precision.INT8))
    result = build(BuildJob(sources, target, given, given), tmp_path / "work", lambda _fraction, _step: None)
    assert result.chosen is not None
    assert result.source.samples == ROWS
    for one in result.candidates:
        if one.recipe.startswith("onnx-static"):
            assert one.error is None or "no layer" in one.error, one.recipe
    check_answers(tmp_path, result.candidates[0], {"x": rows}, exact=True)


def swallowing() -> Any:
    """A net that answers finite numbers to NaN, and is not made for it."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("IsNaN", ["m"], ["lost"]),
        node("Where", ["lost", "no", "m"], ["y"]),
    ]
    return linear(nodes=nodes, weights=[const("no", np.float32(0))])


@pytest.mark.parametrize(
    ("model", "number", "said"),
    [
        (linear, np.nan, "'x' holds NaN, which the model does not take for a missing value: remove those rows"),
        (swallowing, np.nan, "does not take for a missing value"),
        (lambda: imputed(np.nan), np.nan, "does not take for a missing value"),
        (lambda: linear(outputs=[value("x", FLOAT, ["n", 16])]), np.nan, "does not take for a missing value"),
        (trees, np.inf, "'x' holds infinity: remove those rows"),
    ],
)
def test_other_rows_without_numbers_are_refused(
    tmp_path: Path, model: Callable[[], Any], number: float, said: str
) -> None:
    sources = saved(tmp_path, model())
    rows = np.ones((ROWS, 16), np.float32)
    rows[1, 3] = number
    given = stored(tmp_path, "rows.npz", {"x": rows})
    for job in (InspectJob(sources, given), InspectJob(sources, None, given)):
        with pytest.raises(ConversionError, match=said) as found:
            inspect(job, lambda _fraction, _step: None)
        assert found.value.code == "bad_data"


def test_a_net_behind_a_scaler_gets_integers(tmp_path: Path) -> None:
    result, _ = built(tmp_path, scaled(), target=Target("p", RuntimeName.ONNX, ("cpu",), (Precision.INT8,)))
    static = next(one for one in result.candidates if one.recipe == "onnx-static-u8s8")
    assert static.path is not None
    quantized = {tensor.data_type for tensor in onnx.load(tmp_path / "work" / static.path).graph.initializer}
    assert TensorProto.INT8 in quantized


def test_of_nets_whose_weights_two_operators_use(tmp_path: Path) -> None:
    """Their weights can't have a scale a channel: the quantizer makes files that do not load."""
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[0, 2, 3, 1]),
        node("ReduceSum", ["t"], ["s"], keepdims=0),
        node("Conv", ["x", "w"], ["c"]),
        node("Add", ["c", "s"], ["y"]),
    ]
    model = net(
        nodes, [value("x", FLOAT, ["n", 3, 5, 5])], [value("y", FLOAT, ["n", 4, 3, 3])], [weight("w", 4, 3, 3, 3)]
    )
    result, _ = built(tmp_path, model)
    assert all(one.error is None for one in result.candidates if one.recipe.startswith("onnx-static"))


def test_a_net_in_half_precision_gets_integers(tmp_path: Path) -> None:
    result, _ = built(tmp_path, linear(dtype=TensorProto.FLOAT16))
    by_name = {one.recipe: one for one in result.candidates}
    assert "already" in (by_name["onnx-fp16"].error or "")
    for name in ("onnx-dynamic", "onnx-static-u8s8"):
        assert by_name[name].error is None, name
        assert by_name[name].inputs[0].dtype == "float16"


@pytest.mark.parametrize("name", ["branches", "loop", "one axis", "batch of four", "lstm 11", "half", "infinite mask"])
def test_without_any_rows(tmp_path: Path, name: str) -> None:
    result, _ = built(tmp_path, USUAL[name](), data=False)
    assert result.chosen is not None
    assert result.candidates[result.chosen].measurements is not None


def test_free_sizes_are_guessed_until_it_runs(tmp_path: Path) -> None:
    wide = net(
        [node("Conv", ["x", "w"], ["y"])],
        [value("x", FLOAT, ["n", 1, "time"])], [value("y", FLOAT, ["n", 4, "less"])], [weight("w", 4, 1, 200)],
    )  # fmt: skip
    result, _ = built(tmp_path, wide, data=False)
    assert result.candidates[0].inputs[0].example_shape == (1, 1, 256)


def test_when_no_guess_runs_it_asks_for_rows(tmp_path: Path) -> None:
    model = net(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, ["n", "any"])], [value("y", FLOAT, ["n", 5])], [weight("w", 23, 5)],
    )  # fmt: skip
    with pytest.raises(ConversionError, match=r"'x' \[any, any\]: give --calibration or --evaluation"):
        built(tmp_path, model, data=False)


def sequence() -> Any:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    return net([node("SplitToSequence", ["x"], ["s"], axis=1)], [value("x", FLOAT, ["n", 4])],
               [helper.make_value_info("s", kind)], [])  # fmt: skip


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: linear(inputs=[value("t", TensorProto.BFLOAT16, ["n"])]), "'t' is of bfloat16: put a Cast"),
        (lambda: linear(inputs=[value("t", 99, ["n"])]), "'t' is of a dtype, 99, that ONNX does not have"),
        (sequence, "'s' is a sequence: stack it"),
        (lambda: linear(shape_in=None), "'x' does not say how many axes it has: declare its shape"),
        (lambda: linear(opset=9), "opset 9: export it with opset 11 or newer"),
        (lambda: linear(ir=99), "IR version: 99.*save it with an older one"),
        (lambda: linear(opset=99), "pset 99.*export it with an older opset"),
        (
            lambda: linear(nodes=[node("New", ["x"], ["y"], domain="own")], domains=[helper.make_opsetid("own", 1)]),
            "operators of 'own' .New., which devices do not have.*standard operators",
        ),
        (lambda: linear(nodes=[node("New", ["x"], ["y"])]), "does not have that operator: export it with standard"),
        (lambda: linear(dtype=TensorProto.DOUBLE, nodes=[node("Selu", ["x"], ["y"])]), "export it in float32"),
        (
            lambda: net([node("RandomNormal", [], ["y"], shape=[2])], [], [value("y", FLOAT, [2])], []),
            "takes no input",
        ),
    ],
)
def test_refusals_say_what_would_help(tmp_path: Path, model: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConversionError, match=said) as found:
        inspect(InspectJob(saved(tmp_path, model())), lambda _fraction, _step: None)
    assert found.value.field == "sources"
    assert str(tmp_path) not in found.value.detail


def test_rows_that_do_not_fit_each_other_are_shown(tmp_path: Path) -> None:
    sources = saved(tmp_path, recurrent("GRU", 17))
    model = onnx.load(tmp_path / "m.onnx")
    for one in (model.graph.input[1], model.graph.output[1]):
        one.type.tensor_type.shape.dim[1].dim_param = "n"
    onnx.save(model, str(tmp_path / "m.onnx"))
    rows = {"x": np.zeros((4, 3, 1, 6), np.float32), "h": np.zeros((4, 1, 7, 8), np.float32)}
    with pytest.raises(ConversionError, match=r"'x' \[3, 1, 6\], 'h' \[1, 7, 8\]"):
        inspect(InspectJob(sources, stored(tmp_path, "c.npz", rows)), lambda _fraction, _step: None)


def mixing() -> Any:
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[0]),
        node("Sub", ["x", "mean"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    return linear(nodes=nodes)


def one_row_only() -> Any:
    return linear(
        nodes=[node("Reshape", ["x", "shape"], ["r"]), node("MatMul", ["r", "w"], ["y"])],
        weights=[const("shape", np.array([1, 16]))],
    )


@pytest.mark.parametrize(("model", "batch"), [(mixing, 1), (one_row_only, 1), (linear, TARGET.max_batch)])
def test_requests_are_never_batched_where_rows_mix(tmp_path: Path, model: Callable[[], Any], batch: int) -> None:
    result, arrays = built(tmp_path, model())
    assert {one.max_batch for one in result.candidates if one.measurements} == {batch}
    check_answers(tmp_path, result.candidates[0], arrays, exact=True)


def test_labels_where_answers_are_no_classes(tmp_path: Path) -> None:
    sources = saved(tmp_path, USUAL["answers of any length"]())
    rows = stored(tmp_path, "e.npz", {"x": np.tri(4, 16, dtype=np.float32), "y": np.zeros(4, np.int64)})
    with pytest.raises(ConversionError, match="leave `y` out") as found:
        inspect(InspectJob(sources, None, rows), lambda _fraction, _step: None)
    assert found.value.field == "evaluation"


def test_what_the_source_does_not_answer_is_no_loss() -> None:
    exact = np.array([[1.0, np.nan, 3.0], [2.0, np.inf, -np.inf]], np.float32)
    assert fidelity({"y": exact.copy()}, {"y": exact}) == 1.0
    near = np.where(np.isfinite(exact), exact + 0.01, exact).astype(np.float32)
    assert 0.99 < (fidelity({"y": near}, {"y": exact}) or 0) < 1
    assert fidelity({"y": np.nan_to_num(exact)}, {"y": exact}) == 0.0
    assert fidelity({"y": exact}, {"y": np.nan_to_num(exact)}) == 0.0


def logarithm() -> Any:
    return linear(nodes=[node("Log", ["x"], ["l"]), node("MatMul", ["l", "w"], ["y"])])


@pytest.mark.parametrize(("bad", "refused"), [(ROWS, True), (ROWS // 2 + 1, True), (ROWS // 2, False), (0, False)])
def test_a_source_that_answers_no_number_to_most_rows_is_refused(tmp_path: Path, bad: int, refused: bool) -> None:
    """The logarithm of what is below zero is none."""
    sources = saved(tmp_path, logarithm())
    rows = np.ones((ROWS, 16), np.float32) + rng.random((ROWS, 16), np.float32)
    rows[:bad] *= -1
    given = stored(tmp_path, "e.npz", {"x": rows})
    (tmp_path / "work").mkdir()
    target = msgspec.structs.replace(TARGET, precisions=(Precision.FP32,))
    for job in (
        lambda: inspect(InspectJob(sources, None, given), lambda _fraction, _step: None),
        lambda: build(BuildJob(sources, target, None, given), tmp_path / "work", lambda _fraction, _step: None),
    ):
        if not refused:
            job()
            continue
        with pytest.raises(ConversionError, match=f"in 'y' for {bad} of {ROWS} rows of the evaluation set: look"):
            job()


def test_numbers_that_pad_an_answer_are_no_refusal(tmp_path: Path) -> None:
    """As long as there is a finite one; and made-up rows tell nothing of real ones."""
    run = evaluate.Run(np.zeros(2), {"boxes": np.array([[1.0, np.nan], [np.nan, 2.0]])}, {}, "cpu", 1.0, 1.0, 0.0)
    evaluate.check_finite(run, 2, "evaluation")
    model = linear(nodes=[node("Neg", ["x"], ["n"]), node("Log", ["n"], ["l"]), node("MatMul", ["l", "w"], ["y"])])
    inspect(InspectJob(saved(tmp_path, model)), lambda _fraction, _step: None)
    unequal = evaluate.Run(np.zeros(3), {"found": np.full(3, np.nan)}, {}, "cpu", 1.0, 1.0, 0.0)
    with pytest.raises(ConversionError, match="in 'found' for all 2 rows of the calibration set"):
        evaluate.check_finite(unequal, 2, "calibration")


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_answers_are_the_same_from_memory_and_from_a_file(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(evaluate, "SPILL_BYTES", limit)
    monkeypatch.setattr(evaluate, "SLICE_ELEMENTS", 7)
    given = rng.standard_normal((10, 3, 4)).astype(np.float16)
    kept = Answers()
    for start in range(0, 10, 4):
        kept.add(given[start : start + 4])
    whole = kept.whole(10)
    assert isinstance(whole, np.memmap) == (limit == 0)
    np.testing.assert_array_equal(whole, given)
    assert kept.shape == (-1, 3, 4)
    other = given + np.float16(0.1)
    wide, near = given.astype(np.float64), other.astype(np.float64)
    expected = 1 - ((near - wide) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()
    assert fidelity({"y": other}, {"y": whole}) == pytest.approx(expected)


def test_answers_of_unlike_sizes() -> None:
    each = Answers()
    for size in (2, 0, 3):
        each.add(np.ones((4, size), np.float32))
    assert each.shape == (4, -1)
    assert each.whole(3).shape == (20,)
    boxes = Answers()
    for _ in range(3):
        boxes.add(np.ones((5, 6), np.float32))
    assert boxes.whole(3).shape == (3, 5, 6)


def test_tidying_computes_what_the_net_did(tmp_path: Path) -> None:
    for name, make in USUAL.items():
        onnx.save(make(), str(tmp_path / "m.onnx"))
        feed = {key: np.asarray(array[:1] if array.ndim > 1 and name not in WHOLE else array[0])
                for key, array in rows_for(tmp_path / "m.onnx").items()}  # fmt: skip
        before = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, feed)
        after = onnxruntime.InferenceSession(tidied(tmp_path / "m.onnx").SerializeToString()).run(None, feed)
        for one, other in zip(before, after, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=2e-2, atol=1e-2, err_msg=name)


WHOLE = {"branches", "half branches", "loop", "one axis", "batch of four", "lstm 11", "gru 21"}


def test_a_crash_of_a_library_takes_one_recipe_with_it(tmp_path: Path) -> None:
    assert isolated(lambda: 7, tmp_path) == 7
    with pytest.raises(ConversionError, match=r"a library crashed on this net.*SIGKILL") as found:
        isolated(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    assert found.value.code == "tool_crashed"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        isolated(lambda: 1 / 0, tmp_path)
    with pytest.raises(ConversionError, match="no signature") as found:
        isolated(refuse, tmp_path)
    assert found.value.field == "sources"
    assert not list(tmp_path.iterdir())


def refuse() -> None:
    raise ConversionError("no_signature", "it has no signature", "sources")


def test_a_library_error_without_its_code_paths() -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/x/m.onnx failed:/onnxruntime_src/onnxruntime/core/graph/"
        "model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, const std::function<void(int)>&, bool) "
        "Unsupported model IR version: 99, max supported IR version: 14\n"
    )
    assert reason(error) == "Unsupported model IR version: 99, max supported IR version: 14"
    assert reason(AssertionError()) == "AssertionError"
