"""Models of texts in converters and trials: data sets, golden inputs, what is compared, and no pickle anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.trial import golden
from agent.trial.dataset import Dataset, DataSetError, read_checked
from agent.trial.scoring import answering, answers
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.forms import DisagreeError, largest_difference
from converters.package import onnx_specs

TEXT = TensorSpec("t", "string", (-1, 1))
WORDS = ["ab", "", "grün", "a\0b"]


def texts(*values: str) -> np.ndarray:
    return np.array(values, object).reshape(-1, 1)


def manifest(*outputs: TensorSpec) -> Manifest:
    return Manifest(
        "a" * 64, 1, 1, "m", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32, (TEXT,), outputs
    )


class Echo:
    """Answers what it is asked, and how long that is."""

    version, provider, fell_back = "echo 1", "cpu", ""

    def __init__(self, suffix: str = "") -> None:
        self._suffix = suffix

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        words = [str(one) + self._suffix for one in inputs["t"][:, 0]]
        return {"label": np.array(words, object), "length": np.array([[len(one)] for one in words], np.float32)}

    def close(self) -> None:
        pass


def test_texts_of_a_data_set_are_read_without_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for array in (np.array(WORDS).reshape(-1, 1), np.array([one.encode() for one in WORDS]).reshape(-1, 1)):
        np.savez(path, t=array)
        for data in (load_dataset(path, (TEXT,), "evaluation"), read_checked(path, (TEXT,))):
            assert data.inputs["t"].dtype == object
            assert data.inputs["t"][:, 0].tolist() == WORDS
            assert all(type(one) is str for one in data.inputs["t"].flat)


@pytest.mark.parametrize(
    "array",
    [np.array([["a"], [1]], object), np.zeros((2, 1), np.float32), np.array([[b"\xff"], [b"a"]])],
    ids=["pickled", "numbers", "not UTF-8"],
)
def test_what_is_no_text_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, t=array, allow_pickle=True)
    with pytest.raises(ConversionError, match="evaluation"):
        load_dataset(path, (TEXT,), "evaluation")
    with pytest.raises(DataSetError):
        read_checked(path, (TEXT,))


def test_golden_texts_come_back_as_they_were_and_others_are_found(tmp_path: Path) -> None:
    rows = golden.pick_rows(Dataset({"t": texts("one", "", "grün", "nul\0")}, None, 4))
    mine = golden.answer_rows(Echo(), rows)
    path = tmp_path / "golden.npz"
    golden.write(golden.made(rows, mine, mine), path)
    np.load(path, allow_pickle=False)["0/in/t"]
    known = golden.read(path, manifest(TensorSpec("label", "string", (-1,)), TensorSpec("length", "float32", (-1, 1))))
    assert [row["t"][0, 0].rstrip("\0") for row in known.rows] == ["one", "", "grün", "nul"]
    same = golden.Golden(rows, known.answers, known.tolerances)
    assert golden.check(same, Echo()) is None
    assert "output 'label'" in str(golden.check(same, Echo("!")))
    assert set(golden.differences(known)) == {"length"}


def test_long_texts_are_left_out_of_golden_inputs() -> None:
    data = Dataset({"t": texts("a" * 3_000_000, "b")}, None, 2)
    assert golden.pick_rows(data) == ()


def test_choices_are_read_from_scores_where_a_name_comes_first() -> None:
    outputs = (TensorSpec("label", "string", (-1,)), TensorSpec("p", "float32", (-1, 3)))
    scores = np.array([[0.1, 0.8, 0.1]], np.float32)
    assert answering(outputs, {"label": np.array(["b"], object), "p": scores}) == "p"
    assert answering(outputs, {"label": np.array([1]), "p": scores}) == "p"
    assert answering(outputs[:1], {"label": np.array(["b"], object)}) == "label"
    assert answering(outputs, {"label": scores, "p": scores}) == "label"
    assert answers(np.array([2, 0, 1])).tolist() == [2, 0, 1]
    same = answers(np.array(["a", "b", "a"], object))
    assert same[0] == same[2] != same[1]


def test_forms_that_answer_other_texts_disagree() -> None:
    one = {"label": np.array(["a"], object)}
    assert largest_difference(one, one) == 0.0
    with pytest.raises(DisagreeError, match="other texts"):
        largest_difference(one, {"label": np.array(["b"], object)})


def test_texts_pass_and_maps_do_not() -> None:
    text = helper.make_tensor_value_info("t", TensorProto.STRING, ["n", 1])
    encode = helper.make_node(
        "LabelEncoder", ["t"], ["y"], domain="ai.onnx.ml", keys_strings=["a"], values_floats=[1.0]
    )
    score = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])
    model = helper.make_model(helper.make_graph([encode], "g", [text], [score]))
    assert onnx_specs(model) == ((TEXT.__class__("t", "string", (-1, 1)),), (TensorSpec("y", "float32", (-1, 1)),))
    of_maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    zipped = helper.make_value_info("z", of_maps)
    with pytest.raises(ConversionError, match="zipmap"):
        onnx_specs(helper.make_model(helper.make_graph([encode], "g", [text], [zipped])))
