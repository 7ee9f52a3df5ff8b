"""A Dask worker for conversions: one build at a time, with the resources that this machine was measured to have.

When its scheduler goes away the worker ends, with what it was building, and another one waits for the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import hardware
from fleet_server.addresses import is_loopback
from fleet_server.conversions.executor import Resources
from fleet_server.conversions.resources import measured_resources
from fleet_server.settings import check_dask_address, check_dask_tls

log = logging.getLogger(__name__)
AGAIN_S = 1.0


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs.

    Attributes:
        scheduler: `tcp://host:port` or `tls://host:port`.
        host: address to listen on; None is loopback for a scheduler there, and any for one by TLS.
        name: in Dask's pages; None lets Dask name it.
        folder: for working files; None is a temporary one.
        resources: in addition to those that are measured, or instead of one of the same name.
        tls_ca: CA certificate of the cluster (PEM), for `tls://`.
        tls_cert: this worker's certificate.
        tls_key: its key.
    """

    scheduler: str
    host: str | None = None
    name: str | None = None
    folder: Path | None = None
    resources: Resources | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


def listening_host(options: WorkerOptions) -> str | None:
    """Where to listen: None is every address, which only TLS makes safe.

    Raises:
        ValueError: for an address or certificates that do not fit, or a worker open to everybody.
    """
    host = check_dask_address(options.scheduler)
    files = {"--tls-ca": options.tls_ca, "--tls-cert": options.tls_cert, "--tls-key": options.tls_key}
    check_dask_tls(options.scheduler, files)
    if options.host is not None:
        return options.host
    if is_loopback(host):
        return "127.0.0.1"
    if options.scheduler.startswith("tls://"):
        return None
    raise ValueError(
        "without TLS everybody who reaches this worker runs code on it: use a tls:// scheduler, or name the address of "
        "a network that nobody else is on (--host)"
    )


def parse_resources(texts: list[str]) -> Resources:
    """`NAME=AMOUNT` texts.

    Raises:
        ValueError: for another one.
    """
    found: Resources = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            raise ValueError(f"{text!r} is not NAME=AMOUNT, such as GPU=1") from None
        if not name or not 0 <= found[name] < float("inf"):
            raise ValueError(f"{text!r} is not NAME=AMOUNT, such as GPU=1")
    return found


def run(options: WorkerOptions) -> None:
    """Work until SIGINT or SIGTERM.

    Raises:
        ValueError: see `listening_host`.
    """
    host = listening_host(options)
    if not options.scheduler.startswith("tls://") and not is_loopback(host or ""):
        log.warning("NO TLS: everybody who reaches %s runs code on this machine", host)
    with tempfile.TemporaryDirectory(prefix="shoal-worker-", ignore_cleanup_errors=True) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        resources = measured_resources(hardware.measure(folder, tags={})) | (options.resources or {})
        offered = ", ".join(f"{name}={amount:g}" for name, amount in sorted(resources.items()))
        log.info("this worker offers %s", offered)
        asyncio.run(_work(options, host, folder, resources))


async def _work(options: WorkerOptions, host: str | None, folder: Path, resources: Resources) -> None:
    """One worker after another: Dask's do not connect twice."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    stopped = asyncio.create_task(stopping.wait())
    while not stopping.is_set():
        worker = _worker(options, host, folder, resources)
        begun = asyncio.create_task(worker.start())
        try:
            await asyncio.wait({begun, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if begun.done() and not stopping.is_set():
                await begun
                log.info("waiting for conversions of %s", options.scheduler)
                ended = asyncio.create_task(worker.finished())
                await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
        except (OSError, TimeoutError, ValueError) as error:
            log.warning("no Dask scheduler at %s: %s; trying again", options.scheduler, error)
        finally:
            begun.cancel()
            await worker.close(timeout=5)
        if not stopping.is_set():
            log.info("the scheduler is gone, or refused this worker; looking for it again")
            await asyncio.wait({stopped}, timeout=AGAIN_S)


def _worker(options: WorkerOptions, host: str | None, folder: Path, resources: Resources) -> Any:
    from distributed import Worker
    from distributed.security import Security

    secure = options.scheduler.startswith("tls://")
    tls = Security(
        require_encryption=True,
        tls_ca_file=str(options.tls_ca),
        tls_worker_cert=str(options.tls_cert),
        tls_worker_key=str(options.tls_key),
    )
    return Worker(
        options.scheduler,
        nthreads=1,
        resources=resources,
        host=host,
        protocol="tls" if secure else "tcp",
        name=options.name,
        local_directory=str(folder),
        # The child bounds its own memory; Dask's own limits would pause a worker over bytes that are not Dask's.
        memory_limit=0,
        dashboard=False,
        security=tls if secure else None,
    )
