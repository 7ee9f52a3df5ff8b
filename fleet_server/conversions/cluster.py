"""Builds on a Dask cluster: an executor that waits for workers, watches them, and takes only what it asked for.

Dask's own key of a task is the job's id and attempt, so that a server that takes a job over ends what an earlier one
left running, and no two results can be taken for one another. Nothing here outlives a lost scheduler: the rows of the
database are the truth, so the job waits and is sent again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from agent import __version__
from converters.job import BuildResult, JobError, Progress
from fleet_server.addresses import is_loopback
from fleet_server.catalog.artifacts import file_digest
from fleet_server.conversions.cluster_task import PROGRESS_TOPIC, Answer, Event, Request, run_build
from fleet_server.conversions.executor import (
    EXCHANGE,
    BuildOrder,
    NotYetError,
    Resources,
    WorkerLostError,
    bounds_of,
)
from fleet_server.conversions.files import WorkFolder
from fleet_server.conversions.process import CancelledError, ConversionFailedError
from fleet_server.conversions.resources import first_met, missing
from fleet_server.errors import UnavailableError
from fleet_server.settings import Settings, check_dask_address

log = logging.getLogger(__name__)
POLL_S = 0.1
LOOK_S = 1.0
CONNECT_S = 5.0
CALL_S = 5.0
DOWN_S = 2.0
SILENT_S = 20.0


def task_key(job_id: str, attempt: int) -> str:
    """Dask's name of the task of a job's attempt."""
    return f"shoal-conversion-{job_id}-{attempt}"


class DaskExecutor:
    """Builds on the workers of a Dask scheduler. Connects when it first needs to, and again after a loss."""

    def __init__(self, settings: Settings) -> None:
        assert settings.dask_scheduler is not None
        self._settings = settings
        self._address = settings.dask_scheduler
        self._lock = threading.Lock()
        self._client: Any = None
        self._down_until = 0.0
        self._events: dict[str, list[Event]] = {}
        if not self._address.startswith("tls://") and not is_loopback(check_dask_address(self._address)):
            log.warning(
                "the Dask cluster at %s has no TLS: EVERYBODY WHO REACHES ITS SCHEDULER OR A WORKER RUNS CODE THERE. "
                "Use tls:// with SHOAL_DASK_TLS_CA, _CERT and _KEY, or a network that nobody else is on",
                self._address,
            )

    def build(
        self,
        order: BuildOrder,
        folder: WorkFolder,
        *,
        on_progress: Callable[[Progress], None],
        keep_going: Callable[[], bool],
    ) -> BuildResult:
        """Run a build on a worker; see `Executor`."""
        client = self._connected()
        needed = self._met(client, order)
        key = task_key(order.job_id, order.attempt)
        exchange = f"{EXCHANGE}/{order.job_id}-{order.attempt}"
        bounds = bounds_of(order.job, self._settings)
        request = Request(
            version=__version__,
            store=self._settings.effective_artifacts_url,
            exchange=exchange,
            timeout_s=bounds.timeout_s,
            timeout_setting=bounds.timeout_setting,
            memory_mb=bounds.memory_mb,
            cache=self._settings.conversion_cache_mb > 0,
            job=msgspec.Raw(msgspec.json.encode(order.job)),
        )
        self._events[key] = []
        future = None
        try:
            with _losses(self._address):
                self._end_earlier(client, order)
                future = client.submit(
                    run_build, msgspec.json.encode(request), key=key, resources=needed, pure=False, retries=0
                )
            self._wait(client, future, order, on_progress, keep_going)
            result = self._answer(future)
            self._fetch(result, folder, exchange)
            return result
        finally:
            del self._events[key]
            if future is not None:
                with contextlib.suppress(Exception):
                    client.cancel([future], force=True)
            with contextlib.suppress(UnavailableError):
                files = folder.store.folder(exchange)
                files.delete(files.entries())

    def close(self) -> None:
        """Close the connection, which also ends what this server's tasks are doing."""
        with self._lock:
            self._drop()

    def _connected(self) -> Any:
        """The client, connected.

        Raises:
            NotYetError: when the scheduler does not answer.
        """
        with self._lock:
            if self._client is not None and self._client.status == "running":
                return self._client
            self._drop()
            if time.monotonic() >= self._down_until:
                try:
                    self._client = self._connect()
                except (OSError, TimeoutError, ValueError) as error:
                    log.debug("no Dask scheduler at %s: %s", self._address, error)
                    self._down_until = time.monotonic() + DOWN_S
                else:
                    return self._client
        raise NotYetError(_gone(self._address))

    def _connect(self) -> Any:
        from distributed import Client

        client = Client(
            self._address,
            timeout=CONNECT_S,
            security=security(self._settings) if self._address.startswith("tls://") else None,
            set_as_default=False,
            name="shoal-server",
        )
        client.subscribe_topic(PROGRESS_TOPIC, self._on_event)
        log.info("conversions run on the Dask cluster at %s", self._address)
        return client

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close(timeout=2)

    def _on_event(self, event: tuple[float, Any]) -> None:
        with contextlib.suppress(msgspec.MsgspecError):
            found = msgspec.convert(event[1], Event)
            self._events.get(found.key, []).append(found)

    def _workers(self, client: Any) -> dict[str, Resources]:
        """Resources of each worker by its address.

        Raises:
            NotYetError: when the scheduler does not answer.
        """
        with _losses(self._address):
            found = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=CALL_S)
        return {address: one["resources"] for address, one in found["workers"].items()}

    def _met(self, client: Any, order: BuildOrder) -> Resources:
        try:
            workers = self._workers(client).values()
        except NotYetError as error:
            raise NotYetError(str(error)) from None
        needed = first_met(order.needs, workers)
        if needed is None:
            raise NotYetError(missing(order.needs, workers))
        return needed

    @staticmethod
    def _end_earlier(client: Any, order: BuildOrder) -> None:
        """End what earlier attempts left on the cluster: their servers were killed, or lost their lease."""
        from distributed import Future

        if order.attempt > 1:
            earlier = [Future(task_key(order.job_id, one), client) for one in range(1, order.attempt)]
            client.cancel(earlier, force=True)

    def _wait(
        self,
        client: Any,
        future: Any,
        order: BuildOrder,
        on_progress: Callable[[Progress], None],
        keep_going: Callable[[], bool],
    ) -> None:
        """Wait for the end of a task, and see whether its worker is still there."""
        events = self._events[future.key]
        runner = None
        looked_at = answered_at = time.monotonic()
        on_progress(Progress(0.0, "waits for a free worker"))
        while not future.done():
            if not keep_going():
                raise CancelledError
            if events:
                newest = events[-1]
                if any(event.worker != (runner or events[0].worker) for event in events):
                    raise WorkerLostError
                runner = newest.worker
                events.clear()
                on_progress(newest.progress)
            if time.monotonic() - looked_at > LOOK_S:
                try:
                    workers = self._workers(client)
                except NotYetError:
                    if time.monotonic() - answered_at > SILENT_S:
                        raise
                    continue
                finally:
                    looked_at = time.monotonic()
                answered_at = looked_at
                if runner is not None and runner not in workers and not future.done():
                    raise WorkerLostError
                if runner is None and first_met(order.needs, workers.values()) is None:
                    raise NotYetError(missing(order.needs, workers.values()), begun=True)
            time.sleep(POLL_S)

    def _answer(self, future: Any) -> BuildResult:
        from distributed.scheduler import KilledWorker

        if future.status not in {"finished", "error"}:
            raise NotYetError(_gone(self._address), begun=True)
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker):
            raise WorkerLostError
        if isinstance(error, ModuleNotFoundError | ImportError | AttributeError):
            detail = (
                f"a worker can't run Shoal's builds ({error}): install shoal[server,convert,dask] {__version__} there"
            )
            raise ConversionFailedError(JobError("worker_version", detail))
        if error is not None:
            detail = f"the build failed on its worker: {type(error).__name__}: {error}"
            raise ConversionFailedError(JobError("worker_failed", detail[:1000]))
        with _losses(self._address):
            answer = msgspec.json.decode(future.result(timeout=CALL_S), type=Answer)
        if answer.result is None:
            raise ConversionFailedError(answer.error or JobError("worker_failed", "the worker answered nothing"))
        return answer.result

    @staticmethod
    def _fetch(result: BuildResult, folder: WorkFolder, exchange: str) -> None:
        """Bring what was built here, and check that it is what was measured."""
        files = folder.store.folder(exchange)
        for candidate in result.candidates:
            for path, digest in candidate.files.items():
                name = path.rpartition("/")[2]
                files.fetch_to(name, folder.path / name)
                if file_digest(folder.path / name)[0] != digest:
                    detail = f"{name} came from its worker with other bytes than were measured there: build it again"
                    raise ConversionFailedError(JobError("artifact_damaged", detail))


def security(settings: Settings) -> Any:
    """Dask's TLS by the settings: both sides show certificates of the cluster's CA."""
    from distributed.security import Security

    cert, key = str(settings.dask_tls_cert), str(settings.dask_tls_key)
    return Security(
        require_encryption=True, tls_ca_file=str(settings.dask_tls_ca), tls_client_cert=cert, tls_client_key=key
    )


def _gone(address: str) -> str:
    return f"the Dask scheduler at {address} does not answer: start it, or see SHOAL_DASK_SCHEDULER"


class _losses(contextlib.AbstractContextManager[None]):  # noqa: N801 (reads as a verb where it stands)
    """What Dask raises when its scheduler went away, as the error of the seam."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from distributed.client import FutureCancelledError

        if isinstance(error, OSError | TimeoutError | FutureCancelledError):
            raise NotYetError(_gone(self._address), begun=True) from error
