"""Working folders of conversions: the store's objects a job needs, as files with the names of their digests."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from converters.job import BuildJob, DataFile, Weights
from fleet_server.catalog.artifacts import ArtifactStore

LOCK_FILE = "lock"


def file_name(digest: str, suffix: str) -> str:
    """What a job calls an object of the store until somebody brings it to a working folder."""
    return f"{digest}{suffix}"


def data_name(digest: str | None) -> DataFile | None:
    """A data set of the store, by name."""
    return DataFile(digest=digest, path=file_name(digest, ".npz")) if digest else None


class WorkFolder:
    """A folder that vanishes with its job."""

    def __init__(self, path: Path, store: ArtifactStore) -> None:
        self.path = path
        self.store = store

    def fetch(self, digest: str, suffix: str) -> str:
        """The path of an object of the store, brought here once."""
        path = self.path / file_name(digest, suffix)
        if not path.exists():
            self.store.fetch_to(digest, path)
        return str(path)

    def bring(self, name: str) -> str:
        """The path of an object by its `file_name`."""
        digest, dot, suffix = name.partition(".")
        return self.fetch(digest, dot + suffix)

    def data(self, digest: str | None) -> DataFile | None:
        """A data set of the store."""
        return DataFile(digest=digest, path=self.fetch(digest, ".npz")) if digest else None


def localized(job: BuildJob, folder: WorkFolder, onnx2tf_python: Path | None) -> BuildJob:
    """A job whose files lie in a folder of this machine, and whose tools are this machine's.

    Raises:
        UnavailableError: when the store lacks one, or its bytes are others.
    """

    def data(file: DataFile | None) -> DataFile | None:
        return None if file is None else msgspec.structs.replace(file, path=folder.bring(file.path))

    def weights_here(weights: Weights) -> Weights:
        return msgspec.structs.replace(weights, path=folder.bring(weights.path))

    baseline, training = job.baseline, job.training
    if training is not None:
        training = msgspec.structs.replace(training, weights=weights_here(training.weights), data=data(training.data))
    return msgspec.structs.replace(
        job,
        sources=tuple(msgspec.structs.replace(one, path=folder.bring(one.path)) for one in job.sources),
        calibration=data(job.calibration),
        evaluation=data(job.evaluation),
        training=training,
        weights=None if job.weights is None else weights_here(job.weights),
        baseline=None if baseline is None else msgspec.structs.replace(baseline, path=folder.bring(baseline.path)),
        onnx2tf_python=str(onnx2tf_python) if onnx2tf_python else None,
    )


@contextmanager
def work_folder(parent: Path, store: ArtifactStore) -> Iterator[WorkFolder]:
    """A fresh folder below another, removed at the end whatever happens; see `sweep_work_folders` for the rest."""
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder,
        (Path(folder) / LOCK_FILE).open("wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield WorkFolder(Path(folder), store)


def sweep_work_folders(parent: Path, older_than_s: float = 60.0) -> list[Path]:
    """Remove working folders whose process was killed: nobody holds their lock. Returns what was removed."""
    removed = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < older_than_s:
                continue  # it may have been made a moment ago, and not be locked yet
            with (folder / LOCK_FILE).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
    return removed
