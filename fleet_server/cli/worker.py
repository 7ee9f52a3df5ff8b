"""`shoal worker`: a machine of the Dask cluster that runs conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent.protocol.logs import log_to_stderr
from fleet_server.cli.output import fail


def worker(
    scheduler: Annotated[
        str, typer.Option(envvar="SHOAL_DASK_SCHEDULER", help="The Dask scheduler: tcp://host:8786 or tls://host:8786.")
    ],
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on. Default: loopback beside a scheduler there; with TLS, every address."),
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="Something this machine has that Shoal can't measure; repeat."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name in Dask's pages.")] = None,
    folder: Annotated[Path | None, typer.Option(help="For working files. Default: a temporary one.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(envvar="SHOAL_DASK_TLS_CA", help="CA of the cluster (PEM).")] = None,
    tls_cert: Annotated[Path | None, typer.Option(envvar="SHOAL_DASK_TLS_CERT", help="Certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="SHOAL_DASK_TLS_KEY", help="Its key (PEM).")] = None,
) -> None:
    """Run conversions on this machine for a fleet server's Dask cluster.

    One at a time, until Ctrl-C.

    It offers what this machine has (GPUs and their compute capability, CPU features) and needs the server's artifact
    store: a bucket, or its folder mounted at the same path. Without TLS, whoever reaches it runs code on this machine.

    Example: shoal worker --scheduler tcp://127.0.0.1:8786
    """
    import logging

    try:
        import distributed  # noqa: F401 (a clear word here is better than a failure later)

        from fleet_server.conversions.cluster_worker import WorkerOptions, parse_resources, run
    except ModuleNotFoundError as error:
        raise fail(f"{error.name} is not installed: pip install 'shoal[server,convert,dask]'") from None
    log_to_stderr("INFO")
    logging.getLogger("distributed").setLevel(logging.WARNING)
    try:
        run(
            WorkerOptions(
                scheduler=scheduler,
                host=host,
                name=name,
                folder=folder,
                resources=parse_resources(resource or []),
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
            )
        )
    except ValueError as error:
        raise fail(str(error), 2) from None
