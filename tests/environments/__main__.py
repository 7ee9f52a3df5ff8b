"""Runs the agent's worker in environments that Shoal's own can't be: `make test-environments`.

Each is made of what its device would have installed: the agent's base dependencies and one runtime. Shoal's own
environment makes the models and asks; nothing of it is on the other's path but the folder `agent`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.framing import FrameChannel
from agent.serving.ipc import Activate, Activated, Load, Loaded
from converters.package import tflite_specs
from converters.steps.export import export_tflite
from tests.fleet import write_classifier
from tests.serving_worker import start_worker

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {
    "tflite-runtime": ("tflite-runtime==2.14.0", "numpy<2"),
    "onnxruntime-gpu": ("onnxruntime-gpu>=1.31",),
}
FACTS = """
import sys
from pathlib import Path
import msgspec
from agent.hardware import measure
print(msgspec.json.encode(measure(Path(sys.argv[1]), tags={}).runtimes).decode())
"""
ROW = np.eye(8, dtype=np.float32)[1:2]


class WorkerHere:
    """A worker of an environment.

    Attributes:
        facts: runtimes that its agent reports, by name.
    """

    def __init__(self, channel: FrameChannel, url: str, facts: dict[str, dict[str, Any]]) -> None:
        self._channel, self._url, self.facts = channel, url, facts

    def load(self, manifest: Manifest, path: Path, *, may_fall_back: bool = True) -> Loaded:
        """What it says to a load."""
        self._channel.send(Load(1, "deployment", manifest, str(path), may_fall_back=may_fall_back))
        loaded = self._channel.receive()
        assert isinstance(loaded, Loaded), loaded
        said = loaded.detail or f"{loaded.runtime} on {loaded.provider}; fell back: {loaded.fell_back or 'no'}"
        wanted = ", ".join(manifest.providers) or "nothing"
        policy = "" if may_fall_back else ", may not fall back"
        print(f"  {manifest.runtime} {manifest.precision} wants {wanted}{policy}: {loaded.code or 'loaded'}: {said}")
        return loaded

    def answers(self, manifest: Manifest) -> None:
        """Make sure that it answers right what it has loaded."""
        self._channel.send(Activate(2, manifest.model, manifest.digest))
        assert self._channel.receive() == Activated(2, ok=True)
        tensor = {"name": manifest.inputs[0].name, "datatype": "FP32", "shape": [1, 8], "data": ROW[0].tolist()}
        answer = httpx.post(f"{self._url}/v2/models/{manifest.model}/infer", json={"inputs": [tensor]}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert int(np.argmax(answer.json()["outputs"][0]["data"])) == 1, answer.text


@contextmanager
def worker(python: Path, folder: Path) -> Iterator[WorkerHere]:
    """A worker that runs in an environment, with the agent alone on its path."""
    alone = folder / "path"
    alone.mkdir(exist_ok=True)
    if not (alone / "agent").exists():
        (alone / "agent").symlink_to(ROOT / "agent")
    environment = {**os.environ, "PYTHONPATH": str(alone)}
    asked = subprocess.run(
        [str(python), "-c", FACTS, str(folder)], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    facts = {one["name"]: one for one in msgspec.json.decode(asked.stdout)}
    print(f"  facts: {facts}")
    started = start_worker(environment={"PYTHONPATH": str(alone)}, python=python, folder=folder)
    try:
        yield WorkerHere(started.channel, started.url, facts)
    finally:
        started.channel.close()
        assert started.process.wait(30) == 0


def made(
    path: Path, file_format: ModelFormat, specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
) -> Manifest:
    """A manifest of a file."""
    runtime = RuntimeName.ONNX if file_format is ModelFormat.ONNX else RuntimeName.LITERT
    body = path.read_bytes()
    return Manifest(
        hashlib.sha256(body).hexdigest(), len(body), 65536, f"m-{runtime}", "1", "v", "p",
        file_format, runtime, Precision.FP32, *specs,
    )  # fmt: skip


def write_tflite(path: Path) -> None:
    """A net of 8 numbers that answers with the first three of them."""
    import torch

    net = torch.nn.Linear(8, 3)
    with torch.no_grad():
        net.weight[:] = torch.eye(3, 8)
        net.bias[:] = 0
    export_tflite(net.eval(), [ROW], path)


def environment(folder: Path, name: str) -> Path:
    """Make an environment; its Python."""
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *base, *ENVIRONMENTS[name]], check=True)
    return folder / "bin" / "python"


def check_tflite_runtime(here: WorkerHere, lite: tuple[Manifest, Path], net: tuple[Manifest, Path]) -> None:
    """Only LiteRT of 2.14, without ONNX Runtime."""
    assert set(here.facts) == {"litert"}
    assert (here.facts["litert"]["package"], here.facts["litert"]["version"]) == ("tflite-runtime", "2.14.0")
    missing = here.load(*net)
    assert missing.code is WireErrorCode.RUNTIME_MISSING
    assert "shoal[cpu]" in missing.detail
    manifest, path = lite
    loaded = here.load(manifest, path)
    assert (loaded.code, loaded.provider, loaded.fell_back) == (None, "xnnpack", "")
    here.answers(manifest)
    wrong = here.load(msgspec.structs.replace(manifest, precision=Precision.DYNAMIC_INT8), path)
    assert wrong.code is WireErrorCode.PRECISION_UNSUPPORTED
    _check_policies(here, lite, "gpu", "xnnpack")
    _check_policies(here, lite, "edgetpu", "xnnpack")


def check_onnxruntime_gpu(here: WorkerHere, lite: tuple[Manifest, Path], net: tuple[Manifest, Path]) -> None:
    """ONNX Runtime's build for GPUs, where there is none."""
    assert set(here.facts) == {"onnx"}
    assert here.facts["onnx"]["package"] == "onnxruntime-gpu"
    assert "cuda" in here.facts["onnx"]["providers"]
    missing = here.load(*lite)
    assert missing.code is WireErrorCode.RUNTIME_MISSING
    assert "shoal[tflite]" in missing.detail
    _check_policies(here, net, "cuda", "cpu")
    _check_policies(here, net, "tensorrt", "cpu")


def _check_policies(here: WorkerHere, one: tuple[Manifest, Path], provider: str, instead: str) -> None:
    """Where a provider is missing: refused, and then let fall back."""
    manifest, path = msgspec.structs.replace(one[0], providers=(provider, "cpu")), one[1]
    refused = here.load(manifest, path, may_fall_back=False)
    assert refused.code is WireErrorCode.PROVIDER_UNAVAILABLE
    assert f"{provider}: " in refused.detail
    fell = here.load(manifest, path)
    assert (fell.code, fell.provider) == (None, instead)
    assert fell.fell_back.startswith(f"{provider}: ")
    here.answers(manifest)


CHECKS = {"tflite-runtime": check_tflite_runtime, "onnxruntime-gpu": check_onnxruntime_gpu}


def main() -> None:
    """Make both and check each; the first that is otherwise ends it."""
    parser = argparse.ArgumentParser(prog="tests.environments", description=__doc__)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), help="One of them.")
    parser.add_argument("--python", type=Path, help="Of an environment that was made before, with --only.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-environments-") as temporary:
        folder = Path(temporary)
        write_tflite(folder / "m.tflite")
        write_classifier(folder / "m.onnx")
        lite = made(folder / "m.tflite", ModelFormat.TFLITE, tflite_specs(folder / "m.tflite", None))
        plain = ((TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),))
        net = made(folder / "m.onnx", ModelFormat.ONNX, plain)
        for name, check in CHECKS.items():
            if options.only in {None, name}:
                print(f"{name}: {', '.join(ENVIRONMENTS[name])}")
                python = options.python or environment(folder / name, name)
                with worker(python, folder) as here:
                    check(here, (lite, folder / "m.tflite"), (net, folder / "m.onnx"))
                print("  holds")


if __name__ == "__main__":
    main()
