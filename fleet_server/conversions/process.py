"""Runs one conversion in a child process with bounds: the files it loads were made by strangers.

The child ends itself when this process dies (`--parent`), limits its own memory, and is killed with everything it
started when it takes too long or is no longer wanted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from converters.job import ERROR_FILE, JOB_FILE, RESULT_FILE, Job, JobError, Progress
from fleet_server.children import end_group, last_words

log = logging.getLogger(__name__)
LAST_WORDS = "The log of the server, or of the worker that ran it, has its last words"
POLL_S = 0.1
STDERR_TAIL = 1500
RESULT_LIMIT = 64 * 1024 * 1024
LINE_LIMIT = 4096
ResultT = TypeVar("ResultT")


class ConversionFailedError(Exception):
    """The child could not do its job; `error` says why."""

    def __init__(self, error: JobError) -> None:
        super().__init__(f"{error.code}: {error.detail}")
        self.error = error


class CancelledError(Exception):
    """The job is no longer wanted."""


@dataclass(frozen=True)
class Bounds:
    """What a conversion may use: seconds, and MiB of data memory; which setting the seconds come from."""

    timeout_s: float
    memory_mb: int
    timeout_setting: str = "SHOAL_CONVERSION_TIMEOUT_S"


def run_job(
    job: Job,
    folder: Path,
    result_type: type[ResultT],
    bounds: Bounds,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    keep_going: Callable[[], bool] = lambda: True,
) -> ResultT:
    """Run a job in a child process.

    Args:
        job: what to do; its paths must be readable.
        folder: an empty working folder; the caller removes it.
        result_type: what the job answers.
        bounds: of the child.
        on_progress: called from this thread with each step.
        keep_going: asked every tenth of a second; the child is killed when it says no.

    Raises:
        ConversionFailedError: when the child said why it failed, broke a bound, or died.
        CancelledError: when `keep_going` said no.
    """
    (folder / JOB_FILE).write_bytes(msgspec.json.encode(job))
    with (folder / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "converters.process", str(folder)),
                *("--memory-mb", str(bounds.memory_mb), "--parent", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder.absolute())},  # what a killed child leaves goes with the folder
        )
    steps: list[Progress] = []
    assert child.stdout is not None
    reader = threading.Thread(target=_read_progress, args=(child.stdout, steps), daemon=True)
    reader.start()
    try:
        _wait(child, steps, bounds, on_progress, keep_going)
    finally:
        end_group(child)
        reader.join(5)
        child.stdout.close()
    return _result(child.returncode, folder, result_type, bounds)


def _wait(
    child: subprocess.Popen[bytes],
    steps: list[Progress],
    bounds: Bounds,
    on_progress: Callable[[Progress], None],
    keep_going: Callable[[], bool],
) -> None:
    deadline = time.monotonic() + bounds.timeout_s
    while child.poll() is None:
        if not keep_going():
            raise CancelledError
        if time.monotonic() > deadline:
            detail = f"it took longer than {bounds.timeout_s:g} s ({bounds.timeout_setting})"
            raise ConversionFailedError(JobError("timeout", detail))
        if steps:
            newest = steps[-1]
            steps.clear()
            on_progress(newest)
        time.sleep(POLL_S)


def _read_progress(stdout: IO[bytes], steps: list[Progress]) -> None:
    decoder = msgspec.json.Decoder(Progress)
    with contextlib.suppress(ValueError, OSError):
        while line := stdout.readline(LINE_LIMIT):
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                steps.append(decoder.decode(line))


def _result(status: int, folder: Path, result_type: type[ResultT], bounds: Bounds) -> ResultT:
    with contextlib.suppress(msgspec.MsgspecError, OSError):
        if status == 0:
            return msgspec.json.decode(_read_bounded(folder / RESULT_FILE), type=result_type)
        error = msgspec.json.decode(_read_bounded(folder / ERROR_FILE), type=JobError)
        raise ConversionFailedError(msgspec.structs.replace(error, detail=_without(folder, error.detail)))
    tail = last_words(folder / "stderr", STDERR_TAIL)
    log.warning("a conversion process ended with %d; its last words: %s", status, tail)
    if status == -signal.SIGSEGV:
        detail = f"a library crashed on this model (SIGSEGV): convert it with fewer precisions. {LAST_WORDS}"
        raise ConversionFailedError(JobError("worker_died", detail))
    if status in {-signal.SIGKILL, -signal.SIGABRT} or "MemoryError" in tail or "bad_alloc" in tail:
        detail = (
            f"the conversion process died (status {status}), most likely for lack of memory: it may use "
            f"{bounds.memory_mb} MiB (SHOAL_CONVERSION_MEMORY_MB). {LAST_WORDS}"
        )
        raise ConversionFailedError(JobError("worker_died", detail))
    raise ConversionFailedError(JobError("worker_failed", f"the conversion process ended with {status}. {LAST_WORDS}"))


def _without(folder: Path, detail: str) -> str:
    """Where this machine keeps its files is nobody's business."""
    return detail.replace(f"{folder.absolute()}/", "").replace(f"{folder}/", "")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(RESULT_LIMIT)
