"""`shoal convert` without a server, and `shoal variant explain` with one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import BIN, LocalFleet, write_classifier, write_data


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line; there is no server to reach."""
    environment = {**os.environ, "SHOAL_URL": "http://127.0.0.1:1", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [str(BIN / "shoal"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def here(*arguments: str, fleet: LocalFleet | None = None) -> Result:
    """It in this process, which is quicker; without a fleet there is no server to reach."""
    reached = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token} if fleet else {"SHOAL_URL": "http://127.0.0.1:1"}
    done = CliRunner().invoke(app, arguments, env={**reached, "COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_convert_writes_artifact_manifest_report_and_plot(tmp_path: Path) -> None:
    write_classifier(tmp_path / "m.onnx", hidden=256)
    write_data(tmp_path / "e.npz", rows=200, seed=1)
    write_data(tmp_path / "c.npz", rows=100, seed=2, labelled=False)
    data = ("--calibration", str(tmp_path / "c.npz"), "--evaluation", str(tmp_path / "e.npz"))
    out = tmp_path / "out"
    done = shoal("convert", str(tmp_path / "m.onnx"), "--profile", "x86-64-avx2", *data, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    manifest = json.loads((out / "manifest.json").read_text())
    artifact = (out / "model.onnx").read_bytes()
    assert manifest["digest"] == hashlib.sha256(artifact).hexdigest()
    assert manifest["size"] == len(artifact)
    golden = (out / "golden.npz").read_bytes()
    assert manifest["golden"]["digest"] == hashlib.sha256(golden).hexdigest()
    assert manifest["golden"]["size"] == len(golden) < 8192
    report = (out / "report.md").read_text()
    for recipe in ("onnx-fp32", "onnx-static-u8s8", "onnx-dynamic-matmul", "onnx-weights-int8"):
        assert recipe in report
    assert report.count("| picked |") == 1
    assert (out / "candidates.svg").read_text().lstrip().startswith("<?xml")


def test_what_can_not_be_converted_says_why_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    for arguments, said, status in (
        (("m.onnx", "--profile", "x86-64-avx2"), "not a readable ONNX file", 1),
        (("m.onnx", "--profile", "abacus"), "no shipped profile is called so", 2),
        (("nowhere.onnx", "--profile", "x86-64-avx2"), "no such file", 2),
        (("m.pt2", "--profile", "x86-64-avx2"), "can run code", 2),
    ):
        source, *rest = arguments
        done = here("convert", str(tmp_path / source), *rest, "--out", str(tmp_path / "out"))
        assert done.exit_code == status, done.stderr
        assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_reason_that_recipes_share_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_server.settings.find_onnx2tf_python", lambda _told: None)
    write_classifier(tmp_path / "m.onnx", hidden=8)
    arguments = ("--profile", "android-class-arm64", "--out", str(tmp_path / "out"))
    done = here("convert", str(tmp_path / "m.onnx"), *arguments)
    assert done.exit_code == 1, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("the version has no TFLite form") == 1
    assert "litert-dynamic-int8: not built: as litert-fp32" in said
    assert not (tmp_path / "out").exists()


def test_explain_shows_every_candidates_fate(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path)
    try:
        fleet.start_server()
        fleet.post(
            "/profiles", {"name": "p", "match": {}, "runtime": "onnx", "precisions": ["fp32", "int8", "weight-int4"]}
        )
        write_classifier(tmp_path / "m.onnx", hidden=64)
        fleet.push("m", "1", tmp_path / "m.onnx")
        assert fleet.build("m@1", "p")[0]["state"] == "ready"
        picture = tmp_path / "plot.png"
        shown = here("variant", "explain", "m@1", "--profile", "p", "--plot", str(picture), fleet=fleet)
        assert shown.exit_code == 0, shown.stderr
        assert "picked" in shown.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")
        rows = json.loads(here("variant", "explain", "m@1", "--profile", "p", "-o", "json", fleet=fleet).stdout)
        assert all(row["fate"] for row in rows)
        assert {"onnx-fp32", "onnx-static-u8s8", "onnx-weights-int4"} <= {row["recipe"] for row in rows}
        assert here("variant", "explain", "m@1", "--profile", "q", fleet=fleet).exit_code == 4
    finally:
        fleet.stop()
