"""Golden inputs: what other kernels round otherwise is let pass; another net, and arithmetic that overflows, is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes.base import Array, Tensors
from agent.trial import golden
from agent.trial.dataset import Dataset

MANIFEST = Manifest(
    "a" * 64, 10, 4, "m", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.INT8,
    (TensorSpec("x", "float32", (-1, 64)),), (TensorSpec("scores", "float32", (-1, 10)),),
)  # fmt: skip
Rounding = Callable[[Array], Array]


class Net:
    """A runtime around a function of `x`."""

    version, provider = "numpy", "cpu"

    def __init__(self, answer: Callable[[Array], Array], name: str = "scores") -> None:
        self._answer, self._name = answer, name

    def run(self, inputs: Tensors) -> Tensors:
        return {self._name: self._answer(inputs["x"])}

    def close(self) -> None:
        """Nothing is held."""


class Mlp:
    """A ReLU net of two layers in 32 bits, and quantized as `quantize_static` does: activations uint8, weights int8.

    Args:
        seed: of weights and rows.
        tails: whether few weights and inputs are large; else both fill the 8 bits, as of an equalized net that looks at
            bright images.
    """

    def __init__(self, seed: int, *, tails: bool) -> None:
        rng = np.random.default_rng(seed)
        draw = rng.standard_normal if tails else lambda shape: rng.uniform(-1, 1, shape)
        self.layers = [draw((64, 256)) / 8, draw((256, 10)) / 16]
        rows = np.abs(rng.standard_normal((64, 64))) if tails else rng.uniform(0.2, 1, (64, 64))
        self.rows = rows.astype(np.float32)
        self.tops = [float(self.rows.max()), float(np.maximum(self.rows @ self.layers[0], 0).max())]

    def data(self) -> Dataset:
        return Dataset({"x": self.rows}, None, len(self.rows))

    def plain(self, x: Array) -> Array:
        return np.maximum(x @ self.layers[0], 0) @ self.layers[1]

    def quantized(self, *, rounding: Rounding = np.rint, saturates: bool = False) -> Callable[[Array], Array]:
        def answer(x: Array) -> Array:
            for weights, top in zip(self.layers, self.tops, strict=True):
                scale = np.abs(weights).max(axis=0) / 127
                codes = np.rint(weights / scale).astype(np.int64)
                taken = np.clip(rounding(np.maximum(x, 0) / (top / 255)), 0, 255).astype(np.int64)
                products = taken[:, :, None] * codes[None]
                if saturates:  # vpmaddubsw adds pairs in 16 bits
                    products = np.clip(products[:, ::2] + products[:, 1::2], -32768, 32767)
                x = products.sum(axis=1) * scale * (top / 255)
            return x.astype(np.float32)

        return answer


def made(net: Mlp) -> golden.Golden:
    rows = golden.pick_rows(net.data())
    return golden.made(rows, golden.answer_rows(Net(net.quantized()), rows), golden.answer_rows(Net(net.plain), rows))


ROUNDINGS: list[Rounding] = [np.rint, lambda v: np.floor(v + 0.5), lambda v: np.ceil(v - 0.5), np.floor]


@pytest.mark.parametrize("tails", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_another_rounding_passes_and_an_overflow_does_not(seed: int, tails: bool) -> None:
    net = Mlp(seed, tails=tails)
    wanted = made(net)
    for rounding in ROUNDINGS[:3]:
        assert golden.check(wanted, Net(net.quantized(rounding=rounding))) is None
    if not tails:  # with tails few pairs overflow, and the answers are as good
        problem = golden.check(wanted, Net(net.quantized(saturates=True)))
        assert problem is not None
        assert problem.startswith("output 'scores', row ")
    assert golden.check(wanted, Net(Mlp(seed + 100, tails=tails).quantized())) is not None, "another net"
    turned = golden.check(wanted, Net(lambda x: np.roll(net.quantized()(x), 1, axis=1)))
    assert turned is not None, "its classes are in another order"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_noise_below_a_third_of_the_tolerance_always_passes(seed: int) -> None:
    net = Mlp(3, tails=True)
    wanted = made(net)
    tolerance = wanted.tolerances["scores"]
    spread = np.concatenate([one["scores"].values for one in wanted.answers]).std()
    noise = np.random.default_rng(seed)

    def noisy(x: Array) -> Array:
        exact = net.quantized()(x)
        return exact + noise.uniform(-1, 1, exact.shape) * spread * tolerance / 3

    assert golden.check(wanted, Net(noisy)) is None


def test_a_file_gives_back_what_was_written_and_is_the_same_each_time(tmp_path: Path) -> None:
    wanted = made(Mlp(1, tails=True))
    golden.write(wanted, tmp_path / "one")
    golden.write(wanted, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size < 8 * 1024
    read = golden.read(tmp_path / "one", MANIFEST)
    assert read.tolerances == wanted.tolerances
    assert len(read.rows) == golden.ROWS
    for mine, theirs in zip(read.rows, wanted.rows, strict=True):
        assert np.array_equal(mine["x"], theirs["x"])
    assert golden.check(read, Net(Mlp(1, tails=True).quantized())) is None


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"tolerances": np.zeros(1)}, "no row"),
        ({"0/in/x": np.zeros((1, 64)), "tolerances": np.zeros(1)}, "0/shape/scores"),
        ({"0/in/x": np.array([object()]), "tolerances": np.zeros(1)}, "Object arrays"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(golden.GoldenError, match=said):
        golden.read(tmp_path / "bad.npz", MANIFEST)
    (tmp_path / "noise").write_bytes(b"PK" + bytes(100))
    with pytest.raises(golden.GoldenError):
        golden.read(tmp_path / "noise", MANIFEST)


def test_rows_are_bounded_and_spread_over_the_set() -> None:
    def picked(rows: int, width: int) -> int:
        return len(golden.pick_rows(Dataset({"x": np.zeros((rows, width), np.float32)}, None, rows)))

    assert picked(1000, 8) == golden.ROWS
    assert picked(3, 8) == 3
    assert picked(100, 16_000) == 4, "256 KiB"
    assert picked(100, 150_528) == 1, "one image is more, and is taken"
    assert picked(100, LIMITS.golden_bytes) == 0, "one row is too much"
    ordered = Dataset({"x": np.arange(100, dtype=np.float32)[:, None]}, None, 100)
    firsts = [float(row["x"][0, 0]) for row in golden.pick_rows(ordered)]
    assert (firsts[0], firsts[-1]) == (0.0, 99.0)


def of(answers: list[Array], source: list[Array]) -> golden.Golden:
    rows = tuple({"x": np.zeros((1, 1), np.float32)} for _ in answers)
    kept = [golden.answer_rows(Net(lambda _, one=one: one), rows[:1])[0] for one in answers]  # type: ignore[misc]
    theirs = [golden.answer_rows(Net(lambda _, one=one: one), rows[:1])[0] for one in source]  # type: ignore[misc]
    return golden.made(rows, tuple(kept), tuple(theirs))


def test_a_large_output_is_compared_at_even_distances() -> None:
    mask = np.random.default_rng(0).random((1, 21, 128, 128)).astype(np.float32)
    wanted = of([mask], [mask])
    assert len(wanted.answers[0]["scores"].values) <= golden.KEPT
    assert golden.check(wanted, Net(lambda _: mask + 1e-4)) is None
    assert golden.check(wanted, Net(lambda _: mask[:, ::-1])) is not None
    shorter = golden.check(wanted, Net(lambda _: mask[:, :20]))
    assert shorter is not None
    assert "shape [1, 20, 128, 128]" in shorter


def test_sizes_that_hang_on_the_answer_are_not_compared() -> None:
    wanted = of([np.zeros((3, 4), np.float32)], [np.zeros((4, 4), np.float32)])
    assert golden.check(wanted, Net(lambda _: np.zeros((5, 4), np.float32))) is None
    assert golden.check(wanted, Net(lambda _: np.zeros(5, np.float32))) is not None


def test_integers_may_turn_where_scores_are_near_and_numbers_must_stay_numbers() -> None:
    classes = [np.array([[index % 3]], np.int64) for index in range(4)]
    wanted = of(classes, classes)
    assert golden.check(wanted, Net(lambda _: classes[0])) is not None
    image = np.arange(16, dtype=np.int64)[None]
    near = of([image], [image])
    assert golden.check(near, Net(lambda _: np.where(image < 3, 99, image))) is None
    assert golden.check(near, Net(lambda _: np.where(image < 8, 99, image))) is not None
    holed = np.array([[1.0, np.nan, 3.0]], np.float32)
    wanted = of([holed], [holed])
    assert golden.check(wanted, Net(lambda _: holed.copy())) is None
    assert golden.check(wanted, Net(lambda _: np.nan_to_num(holed))) is not None
    assert golden.check(wanted, Net(lambda _: np.full((1, 3), np.nan, np.float32))) is not None


def test_a_runtime_that_fails_on_a_golden_row_is_a_mismatch() -> None:
    def fails(_: Array) -> Array:
        raise RuntimeError("no kernel")

    problem = golden.check(made(Mlp(0, tails=True)), Net(fails))
    assert problem == "row 0 of the golden inputs is not answered: no kernel"
