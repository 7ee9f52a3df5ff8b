"""Working folders of conversions: the store's objects a job needs, as files with the names of their digests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.job import DataFile
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.settings import Settings


class WorkFolder:
    """A folder that vanishes with its job."""

    def __init__(self, path: Path, store: ArtifactStore) -> None:
        self.path = path
        self._store = store

    def fetch(self, digest: str, suffix: str) -> str:
        """The path of an object of the store, brought here once."""
        path = self.path / f"{digest}{suffix}"
        if not path.exists():
            self._store.fetch_to(digest, path)
        return str(path)

    def data(self, digest: str | None) -> DataFile | None:
        """A data set of the store."""
        return DataFile(digest=digest, path=self.fetch(digest, ".npz")) if digest else None


@contextmanager
def work_folder(settings: Settings, store: ArtifactStore) -> Iterator[WorkFolder]:
    """A fresh folder below the state folder, removed at the end whatever happens."""
    parent = settings.state_dir / "conversions"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
        yield WorkFolder(Path(folder), store)
