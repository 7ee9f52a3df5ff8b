"""`make bench-compress`: what passes with training data buy, on digits over photographs, against the net as it was."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import nn

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.dataset import load_dataset
from converters.evaluate import time_in_turns
from converters.job import BuildJob, BuildResult, DataFile, DerivedSource, SourceFile, Target
from converters.package import manifest_for
from converters.pipeline import build
from converters.steps import export
from converters.training.compress import CompressionPlan, compress
from converters.training.data import Rows
from converters.training.fit import Fitting, copied, error, fit
from tests.benchmarks.common import Checks
from tests.benchmarks.nets import mobilenet_v2, resnet18
from tests.benchmarks.photos import Pictures, load_pictures

BUDGET = 0.5
GOALS = {"ResNet-18": (resnet18, 0.08, 0.08), "MobileNetV2": (mobilenet_v2, 0.45, 0.20)}
STUDENT_MARGIN = 3.0
HALF = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=[*sorted(GOALS), "none"], action="append", help="only this one")
    parser.add_argument("--rows", type=int, default=12_000, help="training rows")
    parser.add_argument("--epochs", type=float, default=3.0, help="of the first training")
    parser.add_argument("--recover", type=float, default=1.5, help="epochs of each fine-tuning")
    parser.add_argument("--skip-adaptive", action="store_true", help="leave out pruning within the budget")
    parser.add_argument("--skip-half", action="store_true", help="leave out pruning alone at half the work")
    parser.add_argument("--skip-student", action="store_true", help="leave out the distilled student")
    options = parser.parse_args()
    checks = Checks("compress")
    training, held = load_pictures(ROOT / ".demo" / "data", training=options.rows, evaluation=4_000)
    evaluation, validation = Pictures(held.x[:2_000], held.y[:2_000]), Rows({"x": held.x[2_000:]}, held.y[2_000:])
    if not options.skip_student:
        students(checks, training, evaluation)
    for name in options.net or GOALS:
        if name == "none":
            continue
        one(checks, name, training, evaluation, validation, options)
    checks.print()


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Often:
    """Says what is going on now and then: progress of a step is many lines."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, text: str) -> None:
        if "of the work:" in text or time.monotonic() > self._next:
            self._next = time.monotonic() + 20
            say(text)


def one(
    checks: Checks,
    name: str,
    training: Pictures,
    evaluation: Pictures,
    validation: Rows,
    options: argparse.Namespace,
) -> None:
    """Train, compress, convert with and without, compare."""
    builder, latency, size = GOALS[name]
    rows, held = Rows({"x": training.x}, training.y), Rows({"x": evaluation.x}, evaluation.y)
    torch.manual_seed(0)
    net = builder()
    fit(net, rows, Fitting(epochs=options.epochs, rate=2e-3, weight_decay=5e-4), say=Often(), name=f"train {name}")
    say(f"{name}: {100 - error(net, held):.2f} % right")
    how = Fitting(epochs=options.recover, rate=1e-3)
    plans = [] if options.skip_adaptive else [CompressionPlan(budget=BUDGET, how=how)]
    plans += [] if options.skip_half else [CompressionPlan(prune=HALF, how=how)]
    nets = [made for plan in plans for made in compress(net, rows, plan, Often(), validation=validation)[0]]
    with tempfile.TemporaryDirectory() as folder:
        result, files = converted(net, nets, training, evaluation, Path(folder))
        compare(checks, name, result, files, Path(folder), latency=latency, size=size)


def converted(
    net: Any, nets: list[Any], training: Pictures, evaluation: Pictures, folder: Path
) -> tuple[BuildResult, dict[str, Path]]:
    source = folder / "m.onnx"
    derived = []
    with export.quiet():
        export.export_onnx(net, [training.x[:2]], source, ["x"])
        for made in nets:
            path = folder / f"{made.name}.onnx"
            export.export_onnx(made.net, [training.x[:2]], path, ["x"])
            derived.append(
                DerivedSource(made.name, (SourceFile(ModelFormat.ONNX, "3" * 64, str(path)),), made.passes, {})
            )
    np.savez(folder / "c.npz", x=training.x[:256])
    np.savez(folder / "e.npz", x=evaluation.x, y=evaluation.y)
    job = BuildJob(
        (SourceFile(ModelFormat.ONNX, "0" * 64, str(source)),),
        Target("bench", RuntimeName.ONNX, ("cpu",), (Precision.FP32, Precision.INT8), accuracy_drop_points=BUDGET),
        DataFile("1" * 64, str(folder / "c.npz")),
        DataFile("2" * 64, str(folder / "e.npz")),
        derived=tuple(derived),
    )
    with export.quiet():
        result = build(job, folder, lambda *_: None)
    for candidate in result.candidates:
        say(f"{candidate.recipe:<34} {candidate.fate}")
    for made in nets:
        for record in made.passes:
            say(f"{made.name}: {record.name} {record.parameters} {record.seconds:.0f} s")
    return result, {one.recipe: folder / str(one.path) for one in result.candidates if one.path}


def compare(
    checks: Checks, name: str, result: BuildResult, files: dict[str, Path], folder: Path, *, latency: float, size: float
) -> None:
    assert result.chosen is not None
    picked = result.candidates[result.chosen]
    assert picked.measurements is not None
    assert result.source.accuracy is not None
    timed = ["onnx-fp32", picked.recipe, *(one for one in files if one.startswith("pruned-0.5+onnx-fp32"))]
    candidates = {one.recipe: one for one in result.candidates}
    target = Target("bench", RuntimeName.ONNX, ("cpu",), ())
    opened = [
        (
            manifest_for(files[one], (candidates[one].inputs, candidates[one].outputs), ModelFormat.ONNX, target),
            files[one],
        )
        for one in timed
    ]
    data = load_dataset(folder / "e.npz", candidates["onnx-fp32"].inputs, "evaluation")
    times = dict(zip(timed, (p50 for p50, _ in time_in_turns(opened, data)), strict=True))
    lost = (result.source.accuracy - (picked.measurements.accuracy or 0)) * 100
    checks.report(f"{name}: accuracy of fp32, %", result.source.accuracy * 100)
    checks.at_most(f"{name}: accuracy lost by {picked.recipe}, points", lost, BUDGET)
    checks.at_most(f"{name}: latency ÷ fp32", times[picked.recipe] / times["onnx-fp32"], latency)
    checks.at_most(f"{name}: size ÷ fp32", picked.measurements.size / result.source.size, size)
    if "pruned-0.5+onnx-fp32" in times:
        half = times["pruned-0.5+onnx-fp32"] / times["onnx-fp32"]
        checks.at_most(f"{name}: pruning alone at half the work: latency ÷ fp32", half, 0.5)


def students(checks: Checks, training: Pictures, evaluation: Pictures) -> None:
    """The same small net, taught and alone, over three seeds."""
    rows, held = Rows({"x": training.x}, training.y), Rows({"x": evaluation.x}, evaluation.y)
    torch.manual_seed(0)
    teacher = small(48)
    fit(teacher, rows, Fitting(epochs=8, rate=2e-3), say=Often(), name="train the teacher")
    say(f"teacher: {100 - error(teacher, held):.2f} % right")
    few = rows.first(min(2_000, rows.count))
    margins = []
    for seed in range(3):
        torch.manual_seed(seed)
        alone = small(12)
        taught = copied(alone)
        how = Fitting(epochs=15, rate=3e-3, seed=seed)
        fit(alone, few, how)
        fit(taught, few, how, teacher=teacher)
        wrong = error(alone, held), error(taught, held)
        say(f"student, seed {seed}: alone {100 - wrong[0]:.2f} %, taught {100 - wrong[1]:.2f} % right")
        margins.append(wrong[0] - wrong[1])
    checks.at_least("distilled student's lead, points, mean of 3 seeds", float(np.mean(margins)), STUDENT_MARGIN)
    checks.at_least("distilled student's lead, points, worst of 3 seeds", min(margins), 0.0)


def small(width: int) -> nn.Module:
    """A plain convolutional net."""
    layers: list[nn.Module] = []
    taken = 3
    for given, stride in ((width, 1), (width * 2, 2), (width * 2, 2), (width * 4, 2)):
        layers += [nn.Conv2d(taken, given, 3, stride, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU()]
        taken = given
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(taken, 10)).eval()


if __name__ == "__main__":
    main()
