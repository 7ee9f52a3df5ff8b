"""`make bench-optimize`: what the planner picks, against fp32 and each library's own default recipe, in one run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnx

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from agent.trial.dataset import Dataset
from converters.dataset import load_dataset
from converters.evaluate import measure, run_file, time_in_turns
from converters.job import BuildJob, BuildResult, DataFile, SourceFile, Target
from converters.package import manifest_for, onnx_specs
from converters.pipeline import build
from converters.steps import export
from converters.steps.onnx_static import Reader
from deploy.demo.data import load_mnist, to_images
from tests.benchmarks.common import Checks
from tests.benchmarks.nets import mobilenet_v2, resnet18, train

BUDGET = 0.5
NETS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}
PRECISIONS = (Precision.FP32, Precision.INT8, Precision.DYNAMIC_INT8, Precision.WEIGHT_INT8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of a net")
    parser.add_argument("--net", choices=sorted(NETS), action="append", help="only this one")
    options = parser.parse_args()
    checks = Checks("optimize")
    data = load_mnist(ROOT / ".demo" / "data")
    images, test = padded(data["train_x"][:12_000]), padded(data["test_x"][:2_000])
    for name in options.net or NETS:
        with tempfile.TemporaryDirectory() as folder:
            net = NETS[name]()
            print(f"training {name} for at most {options.seconds:.0f} s", file=sys.stderr, flush=True)
            train(net, images, data["train_y"][:12_000].astype(np.int64), epochs=3, seconds=options.seconds)
            one(checks, name, net, images[:256], test, data["test_y"][:2_000].astype(np.int64), Path(folder))
    checks.print()


def padded(rows: Any) -> Any:
    """MNIST as 32×32×3 pictures."""
    return np.pad(to_images(rows), ((0, 0), (0, 0), (2, 2), (2, 2)))


def one(checks: Checks, name: str, net: Any, calibration: Any, x: Any, y: Any, folder: Path) -> None:
    """Build, compare, and put down what was found."""
    source = folder / "m.onnx"
    with export.quiet():
        export.export_onnx(net, [x[:2]], source, ["x"])
    np.savez(folder / "c.npz", x=calibration)
    np.savez(folder / "e.npz", x=x, y=y)
    target = Target("bench", RuntimeName.ONNX, ("cpu",), PRECISIONS, accuracy_drop_points=BUDGET)
    job = BuildJob(
        (SourceFile(ModelFormat.ONNX, "0" * 64, str(source)),),
        target,
        DataFile("1" * 64, str(folder / "c.npz")),
        DataFile("2" * 64, str(folder / "e.npz")),
    )
    with export.quiet():
        result = build(job, folder, lambda *_: None)
        defaults = library_defaults(source, folder, calibration)
    for candidate in result.candidates:
        print(f"  {candidate.recipe:<30} {candidate.fate}", file=sys.stderr)
    report(checks, name, result, defaults, source, folder, target)


def report(
    checks: Checks,
    name: str,
    result: BuildResult,
    defaults: dict[str, Path],
    source: Path,
    folder: Path,
    target: Target,
) -> None:
    assert result.chosen is not None
    picked = result.candidates[result.chosen]
    assert picked.measurements is not None
    assert result.source.accuracy is not None
    lost = (result.source.accuracy - (picked.measurements.accuracy or 0)) * 100
    checks.at_most(f"{name}: accuracy lost by the pick ({picked.recipe}), points", lost, BUDGET)
    checks.at_most(f"{name}: size ÷ fp32", picked.measurements.size / source.stat().st_size, 0.30)
    within = [one for one in result.candidates if one.within_budgets and one.path and one.recipe != picked.recipe]
    files = {
        "fp32": source,
        "picked": folder / str(picked.path),
        **{one.recipe: folder / str(one.path) for one in within},
    }
    files |= defaults

    specs = {key: onnx_specs(onnx.load(str(path))) for key, path in files.items()}
    opened = [(manifest_for(path, specs[key], ModelFormat.ONNX, target), path) for key, path in files.items()]
    evaluation = load_dataset(folder / "e.npz", specs["fp32"][0], "evaluation")
    times = dict(zip(files, (p50 for p50, _ in time_in_turns(opened, evaluation)), strict=True))
    checks.at_most(f"{name}: latency ÷ fp32", times["picked"] / times["fp32"], 0.40)
    fastest = min((times[one.recipe] for one in within), default=times["picked"])
    checks.at_most(f"{name}: latency ÷ fastest within budget", times["picked"] / min(fastest, times["picked"]), 1.10)
    for key, path in defaults.items():
        scored = score(path, specs[key], target, evaluation, source, specs["fp32"])
        drop = (result.source.accuracy - (scored or 0)) * 100
        checks.report(f"{name}: {key}: latency ÷ the pick's", times[key] / times["picked"])
        checks.report(f"{name}: {key}: accuracy lost, points", drop)


def score(path: Path, specs: Any, target: Target, data: Dataset, source: Path, plain: Any) -> float | None:
    run = run_file(manifest_for(path, specs, ModelFormat.ONNX, target), path, data)
    base = run_file(manifest_for(source, plain, ModelFormat.ONNX, target), source, data)
    return measure(run, base, data, path.stat().st_size).accuracy


def library_defaults(source: Path, folder: Path, calibration: Any) -> dict[str, Path]:
    """ONNX Runtime's quantizers as they come, without a single option."""
    from onnxruntime.quantization import quantize_dynamic, quantize_static

    found = {"static by default": folder / "default-static.onnx", "dynamic by default": folder / "default-dynamic.onnx"}
    data = Dataset({"x": calibration}, None, len(calibration))
    quantize_static(str(source), str(found["static by default"]), Reader(data, 0, len(calibration)))
    quantize_dynamic(str(source), str(found["dynamic by default"]))
    return found


if __name__ == "__main__":
    main()
