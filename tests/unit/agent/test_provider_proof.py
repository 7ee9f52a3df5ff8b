"""Which execution provider runs a file, and what is said of those that were wanted before it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes import onnx, open_runtime
from agent.runtimes.base import REASON_LENGTH, RuntimeLoadError
from tests.fleet import write_classifier


def classifier(folder: Path, *providers: str) -> tuple[Manifest, Path]:
    path = folder / "m.onnx"
    write_classifier(path)
    body = path.read_bytes()
    made = Manifest(
        hashlib.sha256(body).hexdigest(), len(body), 65536, "m", "1", "v", "p",
        ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),), providers=providers,
    )  # fmt: skip
    return made, path


@pytest.mark.parametrize("providers", [(), ("cpu",), ("cpu", "cuda")])
def test_nothing_is_said_where_the_first_wanted_runs(tmp_path: Path, providers: tuple[str, ...]) -> None:
    runtime = open_runtime(*classifier(tmp_path, *providers), may_fall_back=False)
    assert (runtime.provider, runtime.fell_back) == ("cpu", "")


def test_each_that_was_wanted_before_is_named_with_its_reason(tmp_path: Path) -> None:
    runtime = open_runtime(*classifier(tmp_path, "tensorrt", "cuda", "cpu", "openvino"))
    assert runtime.provider == "cpu"
    assert [one.partition(":")[0] for one in runtime.fell_back.split("; ")] == ["tensorrt", "cuda"]
    many = open_runtime(*classifier(tmp_path, *(f"none{number}" for number in range(99))))
    assert len(many.fell_back) == REASON_LENGTH


def test_where_it_may_not_fall_back_it_fails_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(RuntimeLoadError, match=r"cuda is wanted first.*cuda: this build") as caught:
        open_runtime(*classifier(tmp_path, "cuda"), may_fall_back=False)
    assert caught.value.code is WireErrorCode.PROVIDER_UNAVAILABLE


def test_a_damaged_file_is_no_missing_provider(tmp_path: Path) -> None:
    made, path = classifier(tmp_path, "cuda")
    path.write_bytes(b"no net")
    with pytest.raises(RuntimeLoadError) as caught:
        open_runtime(made, path, may_fall_back=False)
    assert caught.value.code is WireErrorCode.LOAD_FAILED


def test_what_was_compiled_and_does_not_load_any_more_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No provider that compiles runs here: the CPU is made to be one, and what it kept to be damaged."""
    proven = onnx._proven
    tried: list[Path | None] = []

    def damaged(provider: str, manifest: Manifest, path: Path, compiled: Path | None) -> Any:
        tried.append(compiled)
        if compiled is not None:
            raise RuntimeError("the engine is of another driver")
        return proven(provider, manifest, path, compiled)

    monkeypatch.setitem(onnx._KEEPING, "cpu", {})
    monkeypatch.setattr(onnx, "_proven", damaged)
    runtime = open_runtime(*classifier(tmp_path), compiled=tmp_path / "compiled")
    assert (runtime.provider, runtime.fell_back) == ("cpu", "")
    assert tried[0] is not None
    assert not tried[0].exists()
    assert tried[1:] == [None]
