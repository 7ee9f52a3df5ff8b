"""One build on a Dask worker: the same bounded child process, with files from the artifact store and back to it.

The worker needs no database. Models do not pass through Dask: its scheduler would hold each in memory. So the store
must be one that workers reach: a bucket, or a folder that is mounted at the same path.

Requests and answers are JSON, not pickled classes: a worker of another version then refuses by name instead of failing
somewhere inside.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent import __version__
from converters.job import BuildJob, BuildResult, JobError, Progress
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.conversions.cache import run_cached
from fleet_server.conversions.files import WorkFolder, localized
from fleet_server.conversions.process import Bounds, CancelledError, ConversionFailedError
from fleet_server.errors import FleetError
from fleet_server.settings import find_onnx2tf_python

PROGRESS_TOPIC = "shoal-conversions"
WANTED_STATES = frozenset({"executing", "long-running"})


class Request(msgspec.Struct, frozen=True):
    """What a worker is asked.

    Attributes:
        version: of Shoal on the server.
        store: URL of the artifact store.
        exchange: folder of the store for the files that are built.
        timeout_s: of the child.
        timeout_setting: of the server, where that comes from.
        memory_mb: of the child, MiB of data memory.
        cache: whether earlier conversions are used and new ones kept.
        job: as JSON; read only after the version was compared.
    """

    version: str
    store: str
    exchange: str
    timeout_s: float
    timeout_setting: str
    memory_mb: int
    cache: bool
    job: msgspec.Raw


class Answer(msgspec.Struct, frozen=True):
    """What it answers: a result, whose files lie in the exchange folder, or an error."""

    result: BuildResult | None = None
    error: JobError | None = None


class Event(msgspec.Struct, frozen=True):
    """What it says meanwhile: who runs the task of a key, and how far it is."""

    key: str
    worker: str
    progress: Progress


def run_build(request: bytes) -> bytes:
    """Run a build as a task; called by Dask on a worker.

    Raises:
        Reschedule: when this worker is stopping, or the task is not wanted here any more.
    """
    from distributed import Reschedule, get_worker

    worker = get_worker()
    key = str(worker.get_current_task())

    def say(progress: Progress) -> None:
        worker.log_event(PROGRESS_TOPIC, msgspec.to_builtins(Event(key, worker.address, progress)))

    say(Progress(0.0, "starting"))
    try:
        with tempfile.TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as folder:
            answer = answer_to(request, Path(folder), f"worker {worker.address}", say, lambda: _wanted(worker, key))
    except CancelledError:
        raise Reschedule from None
    return msgspec.json.encode(answer)


def _wanted(worker: Any, key: str) -> bool:
    """Whether Dask still wants this task of this worker: it can't interrupt a thread, so the task looks itself."""
    task = worker.state.tasks.get(key)
    return worker.status.name == "running" and task is not None and task.state in WANTED_STATES


def answer_to(
    request: bytes, folder: Path, name: str, say: Callable[[Progress], None], wanted: Callable[[], bool]
) -> Answer:
    """Do what a request asks, in an empty folder.

    Raises:
        CancelledError: when `wanted` said no.
    """
    version = msgspec.json.decode(request, type=_Versioned).version
    if version != __version__:
        detail = f"{name} runs Shoal {__version__}, the server {version}: install the same on both"
        return Answer(error=JobError("worker_version", detail))
    asked = msgspec.json.decode(request, type=Request)
    try:
        store = open_store(asked.store)
        work = WorkFolder(folder, store)
        told = os.environ.get("SHOAL_ONNX2TF_PYTHON")
        job = localized(
            msgspec.json.decode(asked.job, type=BuildJob), work, find_onnx2tf_python(Path(told) if told else None)
        )
        bounds = Bounds(asked.timeout_s, asked.memory_mb, asked.timeout_setting)
        result = run_cached(job, work, bounds, cache=asked.cache, on_progress=say, keep_going=wanted)
        exchange = store.folder(asked.exchange)
        for candidate in result.candidates:
            if not wanted():
                raise CancelledError
            for path in candidate.files:
                exchange.put(folder / Path(path).name)
    except ConversionFailedError as failed:
        return Answer(error=failed.error)
    except FleetError as error:
        detail = f"{name} can't use the artifact store {asked.store}: {error.detail}. {STORE_REMEDY}"
        return Answer(error=JobError("worker_store", detail))
    return Answer(result)


STORE_REMEDY = "Workers and server need the same SHOAL_ARTIFACTS_URL: a bucket, or a folder mounted at the same path"


def open_store(url: str) -> ArtifactStore:
    """The server's store, seen from a worker; a folder that is not there is not made.

    Raises:
        UnavailableError: when it is not there.
    """
    return ArtifactStore.open(url, folder=Path(os.devnull), must_exist=True)


class _Versioned(msgspec.Struct):
    version: str
