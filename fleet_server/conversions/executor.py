"""Where a build runs: the seam between the scheduler, which holds the rows, and the machines that convert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from converters.job import BuildJob, BuildResult, Progress
from fleet_server.conversions.cache import run_cached
from fleet_server.conversions.files import WorkFolder, localized
from fleet_server.conversions.process import Bounds
from fleet_server.settings import Settings

Resources = dict[str, float]
EXCHANGE = "exchange"  # folder of the store for what workers give back; nothing in it outlives its build


@dataclass(frozen=True)
class BuildOrder:
    """A build to run once.

    Attributes:
        job_id: of the row.
        attempt: of the row: an order with a higher one replaces those before it.
        job: what to do; its paths are names, `fleet_server.conversions.files.file_name`.
        needs: resources a worker must have, as alternatives in order of preference; none is any worker.
    """

    job_id: str
    attempt: int
    job: BuildJob
    needs: tuple[Resources, ...] = field(default_factory=tuple)


def bounds_of(job: BuildJob, settings: Settings) -> Bounds:
    """What a build may use: one that trains first may take longer."""
    if job.training is None:
        return Bounds(settings.conversion_timeout_s, settings.conversion_memory_mb)
    return Bounds(settings.training_timeout_s, settings.conversion_memory_mb, "SHOAL_TRAINING_TIMEOUT_S")


class NotYetError(Exception):
    """What the build needs is not there now: ask again later. The text says what, for people.

    Attributes:
        begun: whether it may have begun somewhere.
    """

    def __init__(self, reason: str, *, begun: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun


class WorkerLostError(Exception):
    """The machine that ran the build died; another may run it."""


class Executor(Protocol):
    """Runs builds. Safe to call from several threads."""

    def build(
        self,
        order: BuildOrder,
        folder: WorkFolder,
        *,
        on_progress: Callable[[Progress], None],
        keep_going: Callable[[], bool],
    ) -> BuildResult:
        """Run a build; the files its candidates name lie in the folder afterwards.

        Args:
            order: what to build.
            folder: an empty working folder with access to the store.
            on_progress: called from this thread with each step.
            keep_going: asked several times a second; when it says no, the build is ended wherever it runs.

        Raises:
            ConversionFailedError: when the build failed for good.
            CancelledError: when `keep_going` said no.
            NotYetError: when it could not begin, or what ran it went away with no build to blame.
            WorkerLostError: when its worker died.
        """
        ...

    def close(self) -> None:
        """Give back connections."""
        ...


class ProcessExecutor:
    """A bounded child process of this server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._onnx2tf_python = settings.effective_onnx2tf_python
        self._cache = settings.conversion_cache_mb > 0

    def build(
        self,
        order: BuildOrder,
        folder: WorkFolder,
        *,
        on_progress: Callable[[Progress], None],
        keep_going: Callable[[], bool],
    ) -> BuildResult:
        """Run a build; see `Executor`. This machine is taken to be what the order needs."""
        job = localized(order.job, folder, self._onnx2tf_python)
        bounds = bounds_of(job, self._settings)
        return run_cached(job, folder, bounds, cache=self._cache, on_progress=on_progress, keep_going=keep_going)

    def close(self) -> None:
        """Nothing is held."""
