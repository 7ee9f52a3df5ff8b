"""One served model benchmarked in a process of its own: `python -m agent.commands.benchmark FOLDER`.

Reads job.json, writes result.json. A process of its own, so that nothing of it is in the serving worker's counts, and a
model that crashes takes nothing with it. The kernel is asked to end this process first when memory is short. It shares
the processors with what serves: times are those of this moment, not of an idle device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from agent.commands.benchmark_job import JOB_FILE, RESULT_FILE, BenchmarkJob
from agent.parent import end_first, end_with_parent
from agent.protocol.commands import ModelBenchmark
from agent.protocol.manifest import Manifest
from agent.runtimes import open_runtime
from agent.runtimes.base import Runtime, RuntimeLoadError, Tensors, reason, warm_up_inputs
from agent.trial import golden

WARM_UP = 10
LEAST_RUNS = 20
MOST_RUNS = 100_000  # whose times are kept


def main() -> int:
    """Benchmark the model of the folder's job; the exit status is 0 whenever a result was written."""
    parser = argparse.ArgumentParser(prog="agent.commands.benchmark", description="Started by shoal-agent.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args()
    end_with_parent(options.parent)
    end_first()
    folder: Path = options.folder
    job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=BenchmarkJob)
    part = folder / f"{RESULT_FILE}.part"
    part.write_bytes(msgspec.json.encode(benchmark(job)))
    part.replace(folder / RESULT_FILE)
    return 0


def benchmark(job: BenchmarkJob) -> ModelBenchmark:
    """Load a model and run it, one row at a time and in batches."""
    manifest = job.manifest
    try:
        runtime = open_runtime(manifest, Path(job.path))
    except RuntimeLoadError as error:
        return failed(manifest, error.detail)
    rows, is_golden = _rows(job)
    try:
        for index in range(WARM_UP):
            runtime.run(rows[index % len(rows)])
        times = _times(runtime, rows, job.seconds)
        batch = _batch(manifest, rows)
        batched = _times(runtime, [batch], job.seconds / 2) if batch is not None else None
    except Exception as error:  # noqa: BLE001 (a runtime raises anything; the server hears what)
        return failed(manifest, reason(error))
    p50, p95, p99 = (float(one) for one in np.percentile(times, (50, 95, 99)) * 1000)
    return ModelBenchmark(
        model=manifest.model,
        version=manifest.version,
        runtime=runtime.version,
        provider=runtime.provider,
        runs=len(times),
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        rows_per_s=len(times) / float(times.sum()),
        batch=manifest.max_batch if batched is not None else 0,
        batch_rows_per_s=manifest.max_batch * len(batched) / float(batched.sum()) if batched is not None else 0.0,
        golden=is_golden,
    )


def failed(manifest: Manifest, detail: str) -> ModelBenchmark:
    """What is said of a model that could not be benchmarked."""
    return ModelBenchmark(manifest.model, manifest.version, failure=detail[:1000] or "it said nothing")


def _rows(job: BenchmarkJob) -> tuple[Sequence[Tensors], bool]:
    """Rows to run: the golden ones where they can be read, else one of zeros."""
    if job.golden_path:
        try:
            return golden.read(Path(job.golden_path), job.manifest).rows, True
        except golden.GoldenError:
            pass
    return [warm_up_inputs(job.manifest)], False


def _batch(manifest: Manifest, rows: Sequence[Tensors]) -> Tensors | None:
    """As many rows as the model takes together; None where it takes one at a time."""
    if manifest.max_batch < 2 or manifest.row_by_row:
        return None
    like = [row for row in rows if all(row[name].shape == rows[0][name].shape for name in row)]
    picked = [like[index % len(like)] for index in range(manifest.max_batch)]
    if any(array.ndim == 0 or array.shape[0] != 1 for array in picked[0].values()):
        return None
    return {name: np.concatenate([row[name] for row in picked]) for name in picked[0]}


def _times(runtime: Runtime, rows: Sequence[Tensors], seconds: float) -> np.ndarray:
    """Seconds of each run, for so long, but 20 runs at least."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or (time.perf_counter() < until and len(times) < MOST_RUNS):
        row = rows[len(times) % len(rows)]
        started = time.perf_counter()
        runtime.run(row)
        times.append(time.perf_counter() - started)
    return np.array(times)


if __name__ == "__main__":
    sys.exit(main())
