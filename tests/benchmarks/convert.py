"""`make bench-convert`: every recipe on the demo's net and MNIST: size, accuracy and latency against fp32."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.job import BuildJob, BuildResult, Candidate, DataFile, SourceFile, Target
from converters.pipeline import build
from converters.steps import export
from deploy.demo.data import load_mnist, to_images
from deploy.demo.train import train
from tests.benchmarks.common import Checks


def main() -> None:
    data = load_mnist(ROOT / ".demo" / "data")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(data, folder / "w.safetensors")
        net = export.load_net(f"{ROOT / 'deploy/demo/net.py'}:build", folder / "w.safetensors")
        examples = [to_images(data["train_x"][:2])]
        with export.quiet():
            export.export_onnx(net, examples, folder / "m.onnx", ["x"])
            export.export_tflite(net, examples, folder / "m.tflite")
        np.savez(folder / "c.npz", x=to_images(data["train_x"][:512]))
        np.savez(folder / "e.npz", x=to_images(data["test_x"][:4000]), y=data["test_y"][:4000])
        found = {
            one.recipe: one
            for runtime in (RuntimeName.ONNX, RuntimeName.LITERT)
            for one in candidates(folder, runtime).candidates
        }
    checks = Checks("convert")
    report(checks, found)
    checks.print()


def candidates(folder: Path, runtime: RuntimeName) -> BuildResult:
    sources = (
        SourceFile(ModelFormat.ONNX, "0" * 64, str(folder / "m.onnx")),
        SourceFile(ModelFormat.TFLITE, "1" * 64, str(folder / "m.tflite")),
    )
    job = BuildJob(
        sources,
        Target("bench", runtime, ("cpu",), tuple(Precision)),
        DataFile("2" * 64, str(folder / "c.npz")),
        DataFile("3" * 64, str(folder / "e.npz")),
    )
    with export.quiet():
        return build(job, folder, lambda *_: None)


def report(checks: Checks, found: dict[str, Candidate]) -> None:
    for recipe, one in found.items():
        base = found["onnx-fp32" if recipe.startswith("onnx") else "litert-fp32"].measurements
        if one.measurements is None or base is None:
            checks.add(f"{recipe} built", None, f"built ({one.error})", holds=False)
            continue
        loss = ((base.accuracy or 0) - (one.measurements.accuracy or 0)) * 100
        size_bound = 0.30 if one.precision is Precision.INT8 else 1.02
        checks.at_most(f"{recipe} size ÷ fp32", one.measurements.size / base.size, size_bound)
        checks.at_most(f"{recipe} accuracy lost, points", loss, 0.5)
        checks.report(f"{recipe} p50 ÷ fp32", one.measurements.latency_p50_ms / base.latency_p50_ms)


if __name__ == "__main__":
    main()
