"""One candidate measured in a process of its own: `python -m agent.trial.measure FOLDER`.

Reads job.json, writes result.json.

A process a candidate, so that a crash takes nothing with it, and its peak memory is its own. The kernel is asked to end
this process first when memory runs out, and rather than what serves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.parent import end_first, end_with_parent
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.protocol.messages import Failure, TrialResult
from agent.runtimes import open_runtime
from agent.runtimes.base import Runtime, RuntimeLoadError
from agent.trial.dataset import Dataset, DataSetError, read_checked
from agent.trial.job import ANSWERS_FILE, JOB_FILE, RESULT_FILE, MeasureJob
from agent.trial.scoring import answering, answers, time_in_turns, time_rows

LATENCY_SECONDS = 10.0
NICE = 19


def main() -> int:
    """Measure the candidate of the folder's job; the exit status is 0 whenever a result was written."""
    parser = argparse.ArgumentParser(prog="agent.trial.measure", description="Started by shoal-agent, not by people.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args()
    end_with_parent(options.parent)
    end_first()
    folder: Path = options.folder
    job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=MeasureJob)
    result = measure(job, folder / ANSWERS_FILE)
    part = folder / f"{RESULT_FILE}.part"
    part.write_bytes(msgspec.json.encode(result))
    part.replace(folder / RESULT_FILE)
    return 0


def measure(job: MeasureJob, kept: Path) -> TrialResult:
    """Load, time and answer.

    Args:
        job: the candidate.
        kept: where the reference's answers are kept for the candidates after it.

    Returns:
        What was measured, or why it could not be.
    """
    manifest = job.manifest
    try:
        data = read_checked(Path(job.data), manifest.inputs, manifest.processing)
    except DataSetError as error:
        return _failed(manifest, WireErrorCode.MEASURING_FAILED, f"the evaluation set does not fit: {error}")
    before = _memory_mb("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.monotonic()
    try:
        runtime = open_runtime(manifest, Path(job.path))
    except RuntimeLoadError as error:
        return _failed(manifest, error.code, error.detail)
    load_s = time.monotonic() - started
    try:
        times = time_rows(runtime, data, LATENCY_SECONDS)
        with ThreadPoolExecutor(1, initializer=os.nice, initargs=(NICE,)) as unhurried:
            # This is not timed, and must not slow what serves. On Linux a thread has a niceness of its own.
            chosen = unhurried.submit(_answer_all, runtime, data, manifest).result()
    except Exception as error:  # noqa: BLE001 (a runtime raises anything; the server hears what)
        detail = f"running it on the evaluation set failed: {type(error).__name__}: {str(error)[:400]}"
        return _failed(manifest, WireErrorCode.MEASURING_FAILED, detail)
    peak = _memory_mb("VmHWM")
    against = _against(runtime, job, data)
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    if job.is_reference:
        with kept.open("wb") as file:
            np.save(file, chosen)
    return TrialResult(
        digest=manifest.digest,
        runtime=runtime.version,
        provider=runtime.provider,
        load_s=round(load_s, 4),
        latency_p50_ms=float(p50),
        latency_p95_ms=float(p95),
        latency_p99_ms=float(p99),
        peak_memory_mb=None if peak is None or before is None else max(0.0, peak - before),
        samples=data.rows,
        accuracy=_share(chosen, data.labels),
        agreement=_share(chosen, np.load(kept) if kept.exists() else None),
        against_reference=against,
    )


def _against(runtime: Runtime, job: MeasureJob, data: Dataset) -> float | None:
    """The candidate's median time over the reference's, in turns; None where both do not run side by side."""
    if job.reference is None:
        return None
    try:
        reference = open_runtime(job.reference, Path(job.reference_path))
        (mine, _), (theirs, _) = time_in_turns((runtime, reference), data)
    except Exception:  # noqa: BLE001 (an accelerator may have no room for two; the medians of their own runs stand)
        return None
    return mine / theirs


def _answer_all(runtime: Any, data: Dataset, manifest: Manifest) -> Any:
    pieces = []
    for batch in data.batches(manifest.max_batch):
        outputs = runtime.run(batch)
        value = outputs[answering(manifest.outputs, outputs)]
        pieces.append(answers(value if value.ndim else value[None]))
    return np.concatenate(pieces)


def _share(chosen: Any, wanted: Any) -> float | None:
    return float((chosen == wanted).mean()) if wanted is not None and len(chosen) == len(wanted) else None


def _failed(manifest: Manifest, code: WireErrorCode, detail: str) -> TrialResult:
    return TrialResult(manifest.digest, failure=Failure(code, detail))


def _memory_mb(field: str) -> float | None:
    """A field of this process's status, in MiB; None where the kernel has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return int(found.split()[1]) / 1024 if found else None


if __name__ == "__main__":
    sys.exit(main())
