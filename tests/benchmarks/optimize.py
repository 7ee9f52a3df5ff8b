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
import torch
from torch import nn

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from agent.trial.dataset import Dataset
from agent.trial.scoring import answers
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import run_file, time_in_turns
from converters.job import BuildJob, BuildResult, DataFile, SourceFile, Target
from converters.package import Specs, manifest_for, onnx_specs, tflite_specs, with_examples
from converters.pipeline import build
from converters.planner import NOISE
from converters.step import Context
from converters.steps import export, litert_quantize
from converters.steps.onnx_static import Reader
from converters.training.data import Rows
from converters.training.fit import Fitting, fit
from tests.benchmarks.common import Checks
from tests.benchmarks.nets import Residual, mobilenet_v2, resnet18
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
        source: its file.
        calibration: rows, by input.
        evaluation: rows, by input; class indices as `y` where there are any.
        quality: of the first output on the evaluation rows, in points; more is better.
        latency: goal, as a share of fp32's; None for none.
        size: likewise.
        int8_keeps: whether the best int8 candidate must keep the budget.
        form: of the file.
    """

    name: str
    source: Path
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    quality: Callable[[Any], float]
    latency: float | None = None
    size: float | None = None
    int8_keeps: bool = False
    form: ModelFormat = ModelFormat.ONNX

    @property
    def runtime(self) -> RuntimeName:
        """What runs its files."""
        return RuntimeName.ONNX if self.form is ModelFormat.ONNX else RuntimeName.LITERT

    def specs(self, path: Path) -> Specs:
        """What one of its files takes and gives."""
        if self.form is ModelFormat.ONNX:
            return onnx_specs(onnx.load(str(path)))
        return tflite_specs(path, None if path == self.source else self.specs(self.source))


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
            for case in prepared(name, Path(folder), options):
                (Path(folder) / case.name).mkdir()
                one(checks, case, Path(folder) / case.name)
    checks.print()


def prepared(name: str, folder: Path, options: argparse.Namespace) -> list[Case]:
    """Train or fetch a net.

    Those that are trained run in LiteRT too; of ResNet-18 there is a third, with channels of very unlike scale.
    """
    cache = ROOT / ".demo" / "data"
    if name == "silero-vad":
        count = 200 if options.quick else 2_000
        path, calibration, evaluation = load_speech(cache, calibration=200, evaluation=count)
        return [Case(name, path, calibration, evaluation, right_share(evaluation["y"]))]
    if name == "MiniLM":
        path, calibration, evaluation, judged = load_text(cache, folder)
        return [Case(name, path, calibration, evaluation, lambda answers: 100 * correlation(answers, judged))]
    training, held = load_pictures(cache, training=512 if options.quick else 12_000, evaluation=2_000)
    net, seconds = NETS[name](), 5.0 if options.quick else options.seconds
    print(f"training {name} for at most {seconds:.0f} s", file=sys.stderr, flush=True)
    fit(net, Rows({"x": training.x}, training.y), Fitting(epochs=6, rate=2e-3, weight_decay=5e-4, seconds=seconds))
    data = ({"x": training.x[:256]}, {"x": held.x, "y": held.y}, right_share(held.y))
    cases = [Case(name, exported(net, held.x, folder / "plain.onnx"), *data, 0.40, 0.30)]
    with export.quiet():
        export.export_tflite(net, [held.x], folder / "plain.tflite")
    cases.append(Case(f"{name}, LiteRT", folder / "plain.tflite", *data, None, 0.30, form=ModelFormat.TFLITE))
    if name == "ResNet-18":
        path = exported(rescaled(net), held.x, folder / "rescaled.onnx")
        cases.append(Case(f"{name}, rescaled", path, *data, int8_keeps=True))
    return cases


def exported(net: nn.Module, rows: Any, path: Path) -> Path:
    with export.quiet():
        export.export_onnx(net, [rows[:2]], path, ["x"])
    return path


def rescaled(net: nn.Module) -> nn.Module:
    """The same function, with channels inside its blocks that differ by up to four orders of magnitude."""
    torch.manual_seed(0)
    with torch.no_grad():
        for block in net.modules():
            if isinstance(block, Residual):
                _, norm, _, following, _ = block.body
                factors = 10 ** (4 * torch.rand(norm.num_features) - 2)
                norm.weight *= factors
                norm.bias *= factors
                following.weight /= factors[None, :, None, None]
    return net


def right_share(labels: Any) -> Callable[[Any], float]:
    """Points of accuracy."""
    return lambda output: 100 * float((answers(output) == labels).mean())


def one(checks: Checks, case: Case, folder: Path) -> None:
    """Build, compare, and put down what was found."""
    np.savez(folder / "c.npz", **case.calibration)
    np.savez(folder / "e.npz", **case.evaluation)
    target = Target("bench", case.runtime, ("cpu",), PRECISIONS, accuracy_drop_points=BUDGET)
    job = BuildJob(
        (SourceFile(case.form, "0" * 64, str(case.source)),),
        target,
        DataFile("1" * 64, str(folder / "c.npz")),
        DataFile("2" * 64, str(folder / "e.npz")),
    )
    calibration = load_dataset(folder / "c.npz", case.specs(case.source)[0], "calibration")
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
    data = load_dataset(folder / "e.npz", case.specs(case.source)[0], "evaluation")
    for key, path in files.items():
        try:
            manifest = manifest_for(path, with_examples(case.specs(path), data), case.form, target)
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
    if case.int8_keeps:
        lost = {one.recipe: plain - qualities.get(one.recipe, -1e9) for one in made if one.precision is Precision.INT8}
        best = min(lost, key=lambda one: lost[one])
        checks.at_most(f"{name}: points lost by the best int8 candidate ({best})", lost[best], BUDGET)
    keep = [one.recipe for one in made if plain - qualities.get(one.recipe, -1e9) <= BUDGET]
    fastest = min(keep, key=lambda one: times[one], default=picked.recipe)
    checks.at_most(f"{name}: latency ÷ fastest that keeps ({fastest})", times[picked.recipe] / times[fastest], 1.10)
    for key in (one for one in defaults if one in times):
        checks.report(f"{name}: {key}: latency ÷ the pick's", times[key] / times[picked.recipe])
        checks.report(f"{name}: {key}: points lost", plain - qualities[key])


def library_defaults(case: Case, folder: Path, calibration: Dataset) -> dict[str, Path]:
    """The library's quantizers as they come, without a single option; those that this net breaks are left out."""
    if case.form is ModelFormat.TFLITE:
        return litert_defaults(case, folder, calibration)
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


def litert_defaults(case: Case, folder: Path, calibration: Dataset) -> dict[str, Path]:
    """AI Edge Quantizer's recipes, the dynamic one first in its own guide."""
    context = Context(folder, calibration)
    found = {"dynamic by default": folder / "default-dynamic.tflite", "static by default": folder / "default.tflite"}
    dynamic, static = found.values()
    litert_quantize.without_calibration(case.source, dynamic, context, {"recipe": "dynamic_wi8_afp32"}, {})
    litert_quantize.static(case.source, static, context, {"recipe": "static_wi8_ai8"}, {})
    return found


if __name__ == "__main__":
    main()
