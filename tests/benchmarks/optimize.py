"""`make bench-optimize`: what the planner picks, against fp32 and each library's own default recipe, in one run."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnx

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from agent.trial.dataset import Dataset
from agent.trial.scoring import answers
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import run_file, time_in_turns
from converters.job import BuildJob, BuildResult, DataFile, SourceFile, Target
from converters.package import manifest_for, onnx_specs, with_examples
from converters.pipeline import build
from converters.planner import NOISE
from converters.steps import export
from converters.steps.onnx_static import Reader
from converters.training.data import Rows
from converters.training.fit import Fitting, fit
from tests.benchmarks.common import Checks
from tests.benchmarks.nets import mobilenet_v2, resnet18
from tests.benchmarks.photos import load_pictures
from tests.benchmarks.public.speech import load_speech
from tests.benchmarks.public.text import correlation, load_text

BUDGET = 0.5
NETS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}
PRECISIONS = (Precision.FP32, Precision.INT8, Precision.DYNAMIC_INT8, Precision.WEIGHT_INT8)


@dataclass(frozen=True)
class Case:
    """A net with its data.

    Attributes:
        name: for people.
        source: its ONNX file.
        calibration: rows, by input.
        evaluation: rows, by input; class indices as `y` where there are any.
        quality: of the first output on the evaluation rows, in points; more is better.
        latency: goal, as a share of fp32's; None for none.
        size: likewise.
    """

    name: str
    source: Path
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    quality: Callable[[Any], float]
    latency: float | None = None
    size: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of a net")
    parser.add_argument("--net", choices=[*sorted(NETS), "silero-vad", "MiniLM"], action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="few rows, hardly any training: does it run at all?")
    options = parser.parse_args()
    checks = Checks("optimize")
    wanted = options.net or [*NETS, "silero-vad", "MiniLM"]
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            one(checks, prepared(name, Path(folder), options), Path(folder))
    checks.print()


def prepared(name: str, folder: Path, options: argparse.Namespace) -> Case:
    """Train or fetch a net."""
    cache = ROOT / ".demo" / "data"
    if name == "silero-vad":
        count = 200 if options.quick else 2_000
        path, calibration, evaluation = load_speech(cache, calibration=200, evaluation=count)
        return Case(name, path, calibration, evaluation, right_share(evaluation["y"]))
    if name == "MiniLM":
        path, calibration, evaluation, judged = load_text(cache, folder)
        return Case(name, path, calibration, evaluation, lambda answers: 100 * correlation(answers, judged))
    training, held = load_pictures(cache, training=512 if options.quick else 12_000, evaluation=2_000)
    net, seconds = NETS[name](), 5.0 if options.quick else options.seconds
    print(f"training {name} for at most {seconds:.0f} s", file=sys.stderr, flush=True)
    fit(net, Rows({"x": training.x}, training.y), Fitting(epochs=6, rate=2e-3, weight_decay=5e-4, seconds=seconds))
    source = folder / "m.onnx"
    with export.quiet():
        export.export_onnx(net, [held.x[:2]], source, ["x"])
    evaluation = {"x": held.x, "y": held.y}
    return Case(name, source, {"x": training.x[:256]}, evaluation, right_share(held.y), 0.40, 0.30)


def right_share(labels: Any) -> Callable[[Any], float]:
    """Points of accuracy."""
    return lambda output: 100 * float((answers(output) == labels).mean())


def one(checks: Checks, case: Case, folder: Path) -> None:
    """Build, compare, and put down what was found."""
    np.savez(folder / "c.npz", **case.calibration)
    np.savez(folder / "e.npz", **case.evaluation)
    target = Target("bench", RuntimeName.ONNX, ("cpu",), PRECISIONS, accuracy_drop_points=BUDGET)
    job = BuildJob(
        (SourceFile(ModelFormat.ONNX, "0" * 64, str(case.source)),),
        target,
        DataFile("1" * 64, str(folder / "c.npz")),
        DataFile("2" * 64, str(folder / "e.npz")),
    )
    specs = onnx_specs(onnx.load(str(case.source)))
    calibration = load_dataset(folder / "c.npz", specs[0], "calibration")
    with export.quiet():
        result = build(job, folder, lambda *_: None)
        defaults = library_defaults(case, folder, calibration)
    for candidate in result.candidates:
        print(f"  {candidate.recipe:<30} {candidate.fate}", file=sys.stderr)
    report(checks, case, result, defaults, folder, target)


def report(
    checks: Checks, case: Case, result: BuildResult, defaults: dict[str, Path], folder: Path, target: Target
) -> None:
    """Quality, size and latency of the pick beside fp32's, every other candidate's, and the libraries' defaults."""
    assert result.chosen is not None
    picked = result.candidates[result.chosen]
    assert picked.measurements is not None
    made = [one for one in result.candidates if one.path and one.measurements and not one.same_as]
    files = {"fp32": case.source, **{one.recipe: folder / str(one.path) for one in made}, **defaults}
    opened, qualities = {}, {}
    specs = onnx_specs(onnx.load(str(case.source)))
    data = load_dataset(folder / "e.npz", specs[0], "evaluation")
    for key, path in files.items():
        manifest = manifest_for(path, with_examples(onnx_specs(onnx.load(str(path))), data), ModelFormat.ONNX, target)
        try:
            qualities[key] = case.quality(run_file(manifest, path, data).first_output)
        except ConversionError as error:
            print(f"  {key} does not run: {error.detail[:200]}", file=sys.stderr)
            continue
        opened[key] = (manifest, path)
    times = dict(zip(opened, (p50 for p50, _ in time_in_turns(list(opened.values()), data)), strict=True))
    name, plain = case.name, qualities["fp32"]
    checks.report(f"{name}: fp32, points", plain)
    checks.at_most(f"{name}: points lost by the pick ({picked.recipe})", plain - qualities[picked.recipe], BUDGET)
    ratio = times[picked.recipe] / times["fp32"]
    checks.at_most(f"{name}: latency ÷ fp32", ratio, case.latency or NOISE)
    size = picked.measurements.size / case.source.stat().st_size
    if case.size is None:
        checks.report(f"{name}: size ÷ fp32", size)
    else:
        checks.at_most(f"{name}: size ÷ fp32", size, case.size)
    keep = [one.recipe for one in made if plain - qualities.get(one.recipe, -1e9) <= BUDGET]
    fastest = min(keep, key=lambda one: times[one], default=picked.recipe)
    checks.at_most(f"{name}: latency ÷ fastest that keeps ({fastest})", times[picked.recipe] / times[fastest], 1.10)
    for key in (one for one in defaults if one in times):
        checks.report(f"{name}: {key}: latency ÷ the pick's", times[key] / times[picked.recipe])
        checks.report(f"{name}: {key}: points lost", plain - qualities[key])


def library_defaults(case: Case, folder: Path, calibration: Dataset) -> dict[str, Path]:
    """ONNX Runtime's quantizers as they come, without a single option; those that this net breaks are left out."""
    from onnxruntime.quantization import quantize_dynamic, quantize_static

    found = {}
    source, reader = str(case.source), Reader(calibration, 0, calibration.rows)
    static, dynamic = folder / "default-static.onnx", folder / "default-dynamic.onnx"
    with contextlib.suppress(Exception):
        quantize_static(source, str(static), reader)
        found["static by default"] = static
    with contextlib.suppress(Exception):
        quantize_dynamic(source, str(dynamic))
        found["dynamic by default"] = dynamic
    return found


if __name__ == "__main__":
    main()
