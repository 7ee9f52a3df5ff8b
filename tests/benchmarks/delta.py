"""`make bench-delta`: what a new version costs over the air for a device that holds the one before it, and to apply.

Two nets (10 and 50 MB) are trained for a moment; then their last layers are fine-tuned, 2 % of their weights change,
every weight changes by 0.001 σ, or that is quantized to int8 again. Shoal's pick, made as the server makes it, stands
beside zstd -19, bsdiff and zstd with the old file as its prefix (--patch-from). `--large` adds a file of 500 MB.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bsdiff4
import numpy as np
import onnx
import torch
from backports import zstd
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agent.protocol.delta import ZSTD
from converters.steps import export
from tests.benchmarks.common import Checks, pss_mb
from tests.benchmarks.nets import Residual

GOALS = {"last layers": 5.2, "2 % of weights": 2.1, "every weight by 0.001 σ": 57.0, "int8, every weight": 3.3}
CLOSE = 1.02  # times the smallest of the others
MEMORY_MB = 8.0  # over a bare Python
HEAD = 0.07  # share of the weights that are the last two layers
SIDE = 16
STEPS, BATCH = 60, 32


@dataclass(frozen=True)
class Change:
    """A version, and the one that devices hold."""

    name: str
    base: Path
    target: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a small net and hardly any training, for a test")
    parser.add_argument("--large", action="store_true", help="also 500 MB (some minutes more)")
    options = parser.parse_args()
    checks = Checks("delta")
    widths = {"0.2 MB": 4} if options.short else {"10 MB": 30, "50 MB": 65}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, width in widths.items():
            for change in changes(folder, width, steps=3 if options.short else STEPS):
                compare(checks, size, change, folder, whole=not options.short)
        if options.large:
            large(checks, folder)
    checks.print()


# -- what changes


def network(width: int) -> nn.Sequential:
    """ResNet-18's body over 16×16 pictures, and two linear layers that hold `HEAD` of the weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    taken = width
    for times, stride in ((1, 1), (2, 2), (4, 2), (8, 2)):
        layers += [Residual(taken, width * times, stride), Residual(width * times, width * times, 1)]
        taken = width * times
    body = sum(one.numel() for layer in layers for one in layer.parameters())
    hidden = int(body * HEAD / (1 - HEAD) / (taken + 10))
    head = [nn.Linear(taken, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def pictures(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of ten patterns, which `seed` makes, anywhere in noise."""
    rng = np.random.default_rng(seed)
    patterns = rng.standard_normal((10, 3, 8, 8)).astype(np.float32)
    x = (rng.standard_normal((rows, 3, SIDE, SIDE)) * 0.5).astype(np.float32)
    y = rng.integers(0, 10, rows)
    for row, label in enumerate(y):
        top, left = rng.integers(0, SIDE - 8, 2)
        x[row, :, top : top + 8, left : left + 8] += patterns[label]
    return torch.from_numpy(x), torch.from_numpy(y)


def train(net: nn.Module, weights: list[nn.Parameter], *, seed: int, steps: int, rate: float) -> None:
    x, y = pictures(steps * BATCH, seed)
    optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def changes(folder: Path, width: int, *, steps: int) -> Iterator[Change]:
    torch.manual_seed(0)
    net = network(width)
    for part in net.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):  # as ResNets begin (He et al.); trained weights are no more uniform
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    train(net.train(), list(net.parameters()), seed=1, steps=steps, rate=0.05)
    base = exported(net, folder / "base.onnx")
    tuned = copy.deepcopy(net).eval()
    head = [one for layer in list(tuned)[-3:] for one in layer.parameters()]
    train(tuned, head, seed=2, steps=steps, rate=0.01)
    yield Change("last layers", base, exported(tuned, folder / "last.onnx"))
    rng = np.random.default_rng(0)
    few = changed(net, lambda w: w + noise(rng, w, 0.1) * (rng.random(w.shape) < 0.02))
    yield Change("2 % of weights", base, exported(few, folder / "few.onnx"))
    every = exported(changed(net, lambda w: w + noise(rng, w, 1e-3)), folder / "every.onnx")
    yield Change("every weight by 0.001 σ", base, every)
    yield Change("int8, every weight", quantized(base, folder / "old8.onnx"), quantized(every, folder / "new8.onnx"))


def changed(net: nn.Sequential, change: Callable[[Any], Any]) -> nn.Sequential:
    """The net with every weight changed; σ is that of its layer."""
    other = copy.deepcopy(net).eval()
    for weights in other.parameters():
        if weights.ndim > 1:
            value = change(weights.detach().numpy())
            weights.data = torch.from_numpy(value.astype(np.float32))
    return other


def exported(net: nn.Module, path: Path) -> Path:
    with export.quiet():
        export.export_onnx(net.eval(), [pictures(2, 3)[0].numpy()], path, ["x"])
    return path


def noise(rng: np.random.Generator, weights: Any, share: float) -> Any:
    return rng.standard_normal(weights.shape) * weights.std() * share


def quantized(source: Path, path: Path) -> Path:
    rows = iter([{"x": pictures(16, 4)[0].numpy()}])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(rows, None)

    quantize_static(
        str(source), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


# -- what it costs


def compare(checks: Checks, size: str, change: Change, folder: Path, *, whole: bool) -> None:
    case = f"{size} {change.name}"
    old, new = change.base.read_bytes(), change.target.read_bytes()
    others = {"zstd -19": len(packed(new)), "zstd patch": len(packed(new, prefix=old))}
    others["bsdiff"] = len(bsdiff4.diff(old, new))
    started = time.monotonic()
    made, encoded = pick(change, folder)
    seconds = time.monotonic() - started
    goal = GOALS[change.name]
    (checks.at_most if whole else lambda name, value, _: checks.report(name, value))(
        f"{case}: Shoal's pick, % of the file", 100 * made["size"] / len(new), goal
    )
    for name, count in others.items():
        checks.report(f"{case}: {name}, %", 100 * count / len(new))
    checks.at_most(f"{case}: pick ÷ smallest other", made["size"] / min(others.values()), CLOSE)
    checks.report(f"{case}: made in, s ({made['codec']}, {made['plan']})", seconds)
    applied(checks, case, made, encoded, change, folder)


def packed(content: bytes, prefix: bytes | None = None) -> bytes:
    parameter = zstd.CompressionParameter
    if prefix is None:
        return zstd.compress(content, 19)
    window = max(27, (len(content) + len(prefix)).bit_length())
    options = {parameter.compression_level: 19, parameter.window_log: window}
    options |= {parameter.enable_long_distance_matching: 1}
    return zstd.compress(content, options=options, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix)


def pick(change: Change, folder: Path) -> tuple[dict[str, Any], Path]:
    """The smaller of what the server would offer: the difference, and the artifact compressed."""
    found = []
    for name, base in (("difference", change.base), ("full", None)):
        work = folder / name
        work.mkdir(exist_ok=True)
        for left in work.iterdir():
            left.unlink()
        os.link(change.target, work / "target")
        if base is not None:
            os.link(base, work / "base")
        subprocess.run([sys.executable, "-m", "fleet_server.deltas.process", str(work)], check=True, cwd=ROOT)
        found.append(({**json.loads((work / "result.json").read_text()), "base": base}, work / "encoded"))
    return min(found, key=lambda one: one[0]["size"])


def applied(checks: Checks, case: str, made: dict[str, Any], encoded: Path, change: Change, folder: Path) -> None:
    """Decode it as a device does; what that process takes beyond a bare one."""
    base = str(change.base) if made["base"] and made["codec"] != ZSTD else ""
    arguments = [made["codec"], str(encoded), base, str(folder / "out"), str(change.target.stat().st_size), "0"]
    bare, bare_pss, _ = peak("import time; time.sleep(0.3)")
    resident, pss, seconds = peak("from agent.update import decode; assert not decode.main(sys.argv[1:])", *arguments)
    assert (folder / "out").read_bytes() == change.target.read_bytes()
    checks.at_most(f"{case}: to apply, MB RSS over bare Python", resident - bare, MEMORY_MB)
    checks.at_most(f"{case}: to apply, MB PSS over bare Python", max(0.0, pss - bare_pss), MEMORY_MB)
    checks.report(f"{case}: applied in, s", seconds)


def peak(code: str, *arguments: str) -> tuple[float, float, float]:
    """The most that a Python process took: MB resident (as the kernel says) and PSS (as seen); and its seconds."""
    said = "import sys; {}; print(*[one.split()[1] for one in open('/proc/self/status') if one.startswith('VmHWM')])"
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", said.format(code), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    most = 0.0
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            most = max(most, pss_mb(process.pid))
        time.sleep(0.005)
    output, _ = process.communicate()
    return int(output) / 1024, most, time.monotonic() - started


def large(checks: Checks, folder: Path) -> None:
    """The 50 MB net's weights ten times over: what applying takes must not grow."""
    net, rng = onnx.load(folder / "base.onnx"), np.random.default_rng(5)
    paths = folder / "large-old.onnx", folder / "large-new.onnx"
    weights = [one for one in net.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1]
    copies = [(one.name, rng.permutation(numpy_helper.to_array(one))) for one in weights for _ in range(9)]
    for path in paths:
        for number, (name, value) in enumerate(copies):
            more = noise(rng, value, 0.1) * (rng.random(value.shape) < 0.02) if path is paths[1] else 0
            net.graph.initializer.append(numpy_helper.from_array((value + more).astype(np.float32), f"{name}-{number}"))
        onnx.save(net, path)
        del net.graph.initializer[-len(copies) :]
    change = Change("2 % of weights", *paths)
    made, encoded = pick(change, folder)
    checks.report("500 MB 2 % of weights: Shoal's pick, % of the file", 100 * made["size"] / paths[1].stat().st_size)
    applied(checks, "500 MB 2 % of weights", made, encoded, change, folder)


if __name__ == "__main__":
    main()
