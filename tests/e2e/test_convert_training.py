"""`shoal convert` with training data: prune, fine-tune, export, quantize, measure, pick."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner
from tests.fleet import BIN
from tests.small_net import NET, train, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(NET)
    write_rows(folder / "t.npz", 600, 1)
    write_rows(folder / "e.npz", 200, 2)
    write_rows(folder / "c.npz", 64, 3, labels=False)
    (folder / "p.yaml").write_text(
        "name: here\nruntime: onnx\nprecisions: [fp32, int8]\nbudgets: {accuracy_drop_points: 5}\n"
    )
    train(folder, folder / "t.npz", folder / "w.safetensors")
    return folder


def convert(folder: Path, *arguments: str) -> list[str]:
    return ["convert", f"{folder}/net.py:build", "--profile", str(folder / "p.yaml"), *arguments]


def shoal(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "shoal"), *convert(folder, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("distilled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pruned_distilled_and_integer_ready_nets_are_candidates(folder: Path, *, distilled: bool) -> None:
    out = folder / f"out-{distilled}"
    student = ("--distill", f"{folder}/net.py:student") if distilled else ()
    done = shoal(
        folder, "--weights", f"{folder}/w.safetensors", "--training", f"{folder}/t.npz", "--evaluation",
        f"{folder}/e.npz", "--calibration", f"{folder}/c.npz", "--prune", "adaptive", *student,
        "--quantize-aware", "--epochs", "3", "--budget-points", "3", "--out", str(out), "-o", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = {one["recipe"]: one for one in result["candidates"]}
    starts = {name.partition("+")[0] for name in found if "+" in name}
    students = {"distilled", "distilled-qat"} if distilled else set()
    assert starts - {"pruned-less"} == {"pruned", "whole-qat", "pruned-qat"} | students
    unbuilt = [one["error"] for one in found.values() if not one["measurements"]]
    assert all("nothing to do" in error for error in unbuilt), unbuilt
    chosen = result["candidates"][result["chosen"]]
    whole, small = found["onnx-fp32"]["measurements"], found["pruned+onnx-fp32"]["measurements"]
    assert small["size"] < 0.6 * whole["size"]
    assert "+" in chosen["recipe"], "a smaller net is faster"
    passes = [one["name"] for one in found["pruned-qat+onnx-static-u8s8"]["lineage"]["passes"]]
    assert passes == ["prune-adaptive", "quantize-aware", "onnx-prepare", "onnx-static-int8"]
    assert found["pruned+onnx-fp32"]["lineage"]["tools"]["torch-pruning"]
    report = (out / "report.md").read_text()
    assert "prune-adaptive" in report
    assert (out / "model.onnx").stat().st_size == chosen["measurements"]["size"]
    # The weights that were kept are pushed like any others: the net fits itself to them.
    again = shoal(
        folder, "--weights", str(out / "pruned.safetensors"), "--evaluation", f"{folder}/e.npz", "--out",
        str(folder / f"again-{distilled}"), "-o", "json",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    plain = json.loads(again.stdout)["candidates"][0]["measurements"]
    assert plain["accuracy"] == small["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prune", "0.5"), "--training"),
        (("--training", "nowhere.npz"), "there is no file 'nowhere.npz'"),
        (("--training", "{folder}/c.npz"), "no targets `y`"),
        (("--training", "{folder}/t.npz", "--prune", "half"), "--prune: 'half' is neither"),
        (("--training", "{folder}/t.npz", "--distill", "{folder}/net.py:nothing"), "has no function 'nothing'"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    filled = [one.format(folder=folder) for one in arguments]
    asked = convert(folder, *filled, "--evaluation", f"{folder}/e.npz", "--out", str(folder / "no"))
    done = CliRunner().invoke(app, asked)
    assert done.exit_code in {1, 2}
    assert said in " ".join(done.stderr.split())
    assert not (folder / "no").exists()
