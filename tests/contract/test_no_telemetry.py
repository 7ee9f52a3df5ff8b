"""Nothing on a device tells others of it than Shoal: the runtime keeps no id of the machine and no events to send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.common import write_mlp

RUN = """
import sys
import {package}
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {{"x": np.zeros((1, 8), np.float32)}})
"""


def left_behind(folder: Path, package: str) -> list[str]:
    write_mlp(folder / "net.onnx", 8, 1)
    home = folder / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    code = RUN.format(package=package)
    subprocess.run([sys.executable, "-c", code, str(folder / "net.onnx")], check=True, env=environment, timeout=120)
    return [path.name for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "package", ["agent", "agent.runtimes.onnx", "converters.evaluate", "converters.process", "fleet_server.app"]
)
def test_the_runtime_leaves_nothing_behind(tmp_path: Path, package: str) -> None:
    assert left_behind(tmp_path, package) == []
