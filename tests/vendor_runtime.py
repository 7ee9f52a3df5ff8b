"""A package that brings a runtime, as a vendor would make one: a real wheel, installed by pip into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

NAME = "acme-npu"
MODULE = '''
"""Runs ONNX files by their reference implementation, and calls that an NPU."""

from onnx.reference import ReferenceEvaluator


class AcmeRuntime:
    providers = ("npu",)
    version = "acme 3.1"
    provider = "npu"
    fell_back = ""

    def __init__(self, manifest, path, compiled):
        self._net = ReferenceEvaluator(str(path))
        self._names = [spec.name for spec in manifest.outputs]

    def run(self, inputs):
        return dict(zip(self._names, self._net.run(self._names, dict(inputs))))

    def close(self):
        self._net = None
'''
METADATA = "Metadata-Version: 2.1\nName: acme-runtime\nVersion: 3.1\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def install(folder: Path, patch: pytest.MonkeyPatch, *, module: str = MODULE) -> Path:
    """Build the package and install it; processes that start from now on find it. Returns where it is."""
    wheel, info = folder / "acme_runtime-3.1-py3-none-any.whl", "acme_runtime-3.1.dist-info"
    files = {
        "acme_runtime.py": module,
        f"{info}/METADATA": METADATA,
        f"{info}/WHEEL": WHEEL,
        f"{info}/entry_points.txt": f"[shoal.runtimes]\n{NAME} = acme_runtime:AcmeRuntime\nonnx = acme_runtime:No\n",
    }
    record = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            packed.writestr(name, text)
    target = folder / "packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")])))
    return target
