"""Data sets are read or refused with a reason; scores are those of the textbook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.protocol.manifest import TensorSpec
from agent.trial.dataset import read_checked
from agent.trial.scoring import answers
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import class_scores, fidelity

IMAGE = (TensorSpec("image", "float32", (-1, 3, 4, 4)),)
TWO = (TensorSpec("ids", "int64", (-1, 8)), TensorSpec("mask", "int64", (-1, 8)))


def written(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def test_by_name_and_as_x(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)
    for arrays in ({"image": images}, {"x": images}, {"x": images.astype(np.float64)}):
        found = load_dataset(written(tmp_path, **arrays, y=np.arange(5, dtype=np.uint8)), IMAGE, "evaluation")
        assert found.rows == 5
        assert found.inputs["image"].dtype == np.float32
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2, 3, 4]
        assert [len(batch["image"]) for batch in found.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"picture": np.zeros((2, 3, 4, 4), np.float32)}, r"arrays \['picture'\], but none for the input 'image'"),
        ({"x": np.zeros((2, 4, 4, 3), np.float32)}, r"shape \[2, 4, 4, 3\], but the model takes \[rows, 3, 4, 4\]"),
        ({"x": np.zeros((0, 3, 4, 4), np.float32)}, "same number of rows"),
        ({"x": np.full((2, 3, 4, 4), np.nan, np.float32)}, "NaN"),
        ({"x": np.full((2, 3, 4, 4), 1 + 1j)}, "complex128"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "y": np.zeros(3, np.int64)}, "2 class indices"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "y": np.array([0, -1])}, "class indices"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "y": np.array([0.5, 1.0])}, "class indices, not float64"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "y": np.eye(2, dtype=int)}, "one a row.* or leave `y` out"),
        ({"x": np.full((2, 3, 4, 4), 1e300)}, r"'image' holds 1e\+300, which float32 can't: scale it"),
        ({"x": np.array([[1, 2], ["a", None]], dtype=object)}, "plain arrays"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match=said) as found:
        load_dataset(written(tmp_path, **arrays), IMAGE, "evaluation")
    assert found.value.field == "evaluation"
    assert str(found.value.detail).startswith("evaluation: ")


@pytest.mark.parametrize(("dtype", "held", "lost"), [("int8", -128, 200), ("int32", 7, 3_000_000_000)])
def test_integers_that_the_input_does_not_hold(tmp_path: Path, dtype: str, held: int, lost: int) -> None:
    """To cut them off would calibrate and judge by other rows than those that were given."""
    specs = (TensorSpec("t", dtype, (-1, 2)),)
    found = load_dataset(written(tmp_path, t=np.full((3, 2), held)), specs, "evaluation")
    assert found.inputs["t"].dtype == dtype
    assert (found.inputs["t"] == held).all()
    with pytest.raises(ConversionError, match=rf"'t' holds .*, which {dtype} can't"):
        load_dataset(written(tmp_path, t=np.array([[held, lost]])), specs, "evaluation")


def test_several_inputs_need_their_names_and_as_many_rows(tmp_path: Path) -> None:
    ids, mask = np.zeros((3, 8), np.int64), np.ones((2, 8), np.int64)
    with pytest.raises(ConversionError, match="none for the input 'ids'"):
        load_dataset(written(tmp_path, x=ids), TWO, "calibration")
    with pytest.raises(ConversionError, match="same number of rows"):
        load_dataset(written(tmp_path, ids=ids, mask=mask), TWO, "calibration")


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 cut short"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"not a readable \.npz"):
        load_dataset(path, IMAGE, "calibration")


def test_answers_of_every_shape() -> None:
    assert answers(np.array([[0.1, 0.9], [0.8, 0.2]])).tolist() == [1, 0]
    assert answers(np.array([0.2, 0.7])).tolist() == [0, 1]
    assert answers(np.array([[0.2], [0.7]])).tolist() == [0, 1]
    assert answers(np.array([[[0.0, 1.0], [5.0, 2.0]]])).tolist() == [2]


def test_scores_by_hand() -> None:
    """Three classes: of four zeros three were found, and one was taken for a two; nobody said one."""
    labels, chosen = np.array([0, 0, 0, 0, 1, 2, 2]), np.array([0, 0, 0, 2, 0, 2, 2])
    zero, one, two = class_scores(labels, chosen)
    assert (zero.precision, zero.recall, zero.support) == (0.75, 0.75, 4)
    assert zero.f1 == 0.75
    assert (one.precision, one.recall, one.f1, one.support) == (None, 0.0, 0.0, 1)
    assert two.precision == pytest.approx(2 / 3)
    assert two.recall == 1.0
    assert two.f1 == pytest.approx(0.8)


def test_rows_that_are_whole_inputs(tmp_path: Path) -> None:
    """A recurrent state has its rows on the second axis, and a rate is a scalar."""
    specs = (
        TensorSpec("sound", "float32", (-1, 512)),
        TensorSpec("state", "float32", (2, -1, 128)),
        TensorSpec("rate", "int64", ()),
    )
    path = written(
        tmp_path,
        sound=np.zeros((3, 512), np.float32),
        state=np.zeros((3, 2, 1, 128), np.float32),
        rate=np.full(3, 16000),
    )
    found = load_dataset(path, specs, "evaluation")
    assert found.whole == {"state", "rate"}
    batches = list(found.batches(8))
    assert len(batches) == 3
    assert {name: array.shape for name, array in batches[0].items()} == {
        "sound": (1, 512),
        "state": (2, 1, 128),
        "rate": (),
    }
    assert found.part(1, 9).rows == 2
    with pytest.raises(
        ConversionError, match=r"'state' has shape \[3, 2, 128\], but the model takes \[rows, 2, any, 128\]"
    ):
        load_dataset(
            written(tmp_path, sound=np.zeros((3, 512)), state=np.zeros((3, 2, 128)), rate=np.full(3, 1)), specs, "x"
        )


def test_an_input_that_is_called_as_labels_are(tmp_path: Path) -> None:
    """Its rows are no labels; where it is the only input, labels can be had beside `x`."""
    rows = np.ones((3, 2), np.float32)
    y, x = TensorSpec("y", "float32", (-1, 2)), TensorSpec("x", "float32", (-1, 2))
    for specs, arrays, labelled in (
        ((x, y), {"x": rows, "y": rows + 1}, False),
        ((y,), {"y": rows + 1}, False),
        ((y,), {"x": rows + 1, "y": np.arange(3)}, True),
    ):
        path = written(tmp_path, **arrays)
        for found in (load_dataset(path, specs, "evaluation"), read_checked(path, specs)):
            assert (found.inputs["y"] == rows + 1).all()
            assert (found.labels is not None) is labelled


def test_fidelity_is_the_share_of_the_variance_that_is_there_still() -> None:
    wanted = {"y": np.array([[0.0, 10.0], [2.0, 14.0]], np.float32), "ids": np.array([1, 2])}
    assert fidelity(wanted, wanted) == 1.0
    assert fidelity({**wanted, "ids": np.array([9, 9])}, wanted) == 1.0, "integers have no variance to speak of"
    near = {**wanted, "y": wanted["y"] + np.float32(0.5)}
    assert fidelity(near, wanted) == pytest.approx(1 - 4 * 0.25 / 10)
    assert fidelity({**wanted, "y": wanted["y"] * np.float32("nan")}, wanted) == 0.0
    assert fidelity({**wanted, "y": wanted["y"][:1]}, wanted) == 0.0
    assert fidelity({}, {"ids": wanted["ids"]}) is None
    constant = {"y": np.ones((3, 2), np.float32)}
    assert fidelity(constant, constant) == 1.0
    assert fidelity({"y": constant["y"] + 1}, constant) == 0.0


def test_fidelity_of_what_is_the_same_in_every_row() -> None:
    """A detector answers its anchors with every row: what rounds them has not lost them."""
    anchors = {"anchors": np.tile(np.linspace(0, 1, 7, dtype=np.float32), (3, 1))}
    half = {"anchors": anchors["anchors"].astype(np.float16).astype(np.float32)}
    assert (fidelity(half, anchors) or 0) > 0.999
    assert fidelity({"anchors": 1 - anchors["anchors"]}, anchors) == 0.0
    rounded = {"anchors": anchors["anchors"] + np.float32(1e-8) * np.arange(3, dtype=np.float32)[:, None]}
    assert (fidelity(half, rounded) or 0) > 0.999, "one row apart from another by rounding alone varies no more"
    ones = {"y": np.ones((3, 2), np.float32)}
    assert (fidelity({"y": ones["y"] * np.float32(0.9999)}, ones) or 0) > 0.999
    assert fidelity({"y": np.full((2, 2), 1e200)}, {"y": np.full((2, 2), 1e200)}) == 1.0
