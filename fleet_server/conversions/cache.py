"""Keeps earlier conversions in the artifact store, for servers and workers alike.

They lie in `cache/{source}/{work}/{key}.kept`. The store removes what is below a source with it. A work is the files
that a job works on (`converters.cache.work_digest`); what was kept of it is brought to a folder for the child process,
and what is new there is put into the store. A file `used` is written at each use: the works that were not used for
longest go first when there is too much.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.hardware import parse_cpuinfo
from converters.cache import SUFFIX, work_digest
from converters.job import BuildJob, BuildResult, CacheFolder, Progress
from fleet_server.catalog.artifacts import DERIVED, ArtifactStore, StoreEntry
from fleet_server.conversions.files import WorkFolder
from fleet_server.conversions.process import Bounds, run_job
from fleet_server.errors import UnavailableError

USED = "used"
ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


def run_cached(
    job: BuildJob,
    folder: WorkFolder,
    bounds: Bounds,
    *,
    cache: bool,
    on_progress: Callable[[Progress], None],
    keep_going: Callable[[], bool],
) -> BuildResult:
    """Run a build in a child process; raises as `fleet_server.conversions.process.run_job` does.

    Args:
        job: whose files lie in the folder.
        folder: to work in.
        bounds: of the child.
        cache: whether earlier conversions are used and this one's are kept.
        on_progress: see `run_job`.
        keep_going: see `run_job`.
    """
    with contextlib.ExitStack() as stack:
        if cache:
            job = msgspec.structs.replace(job, cache=stack.enter_context(kept_conversions(job, folder)))
        return run_job(job, folder.path, BuildResult, bounds, on_progress=on_progress, keep_going=keep_going)


@contextmanager
def kept_conversions(job: BuildJob, folder: WorkFolder) -> Iterator[CacheFolder]:
    """A folder with what was kept of a job's work; what the block adds is kept too, unless it fails."""
    source = min(job.sources, key=lambda one: one.format.value).digest
    kept = folder.store.derived(source).folder(work_digest(job))
    local = folder.path / DERIVED
    local.mkdir()
    for name in kept.entries():
        # One that is swept meanwhile, or that the store can't give, is converted again.
        with contextlib.suppress(UnavailableError):
            if ENTRY.fullmatch(name):
                kept.fetch_to(name, local / name)
    before = {path.name: path.stat().st_mtime_ns for path in local.iterdir()}
    yield CacheFolder(str(local), machine_kind())
    with contextlib.suppress(UnavailableError):
        for path in local.iterdir():
            if ENTRY.fullmatch(path.name) and before.get(path.name) != path.stat().st_mtime_ns:
                kept.put(path)
        (folder.path / USED).touch()
        kept.put(folder.path / USED)
        if not folder.store.exists(source):
            # Its version was deleted while this was built, and took away what was derived before this was.
            folder.store.delete(source)


def machine_kind() -> str:
    """Architecture and CPU features: quantized nets answer alike where these are the same."""
    with contextlib.suppress(OSError):
        return " ".join((platform.machine(), *parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))[1]))
    return platform.machine()


def sweep_cache(store: ArtifactStore, limit_bytes: int) -> None:
    """Remove works from the store's cache, those first that were not used for longest, until the rest fits."""
    folder = store.folder(DERIVED)
    folder.delete(too_much(folder.entries(), limit_bytes))


def too_much(entries: Mapping[str, StoreEntry], limit_bytes: int) -> list[str]:
    """The files to remove so that the rest is within a limit: whole works, least recently used first."""
    works: dict[str, list[str]] = {}
    for path in entries:
        works.setdefault(path.rpartition("/")[0], []).append(path)

    def last_use(work: str) -> dt.datetime:
        return max(entries[path].written_at for path in works[work])

    total = sum(entry.size for entry in entries.values())
    removed: list[str] = []
    for work in sorted(works, key=last_use):
        if total <= limit_bytes:
            break
        removed += works[work]
        total -= sum(entries[path].size for path in works[work])
    return removed
