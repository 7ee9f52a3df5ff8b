"""`shoal-server`: the fleet server without the rest of the command line."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import sys
import textwrap
from typing import Any

from pydantic import ValidationError

from fleet_server.addresses import is_loopback
from fleet_server.settings import Settings


def main() -> None:
    """Run the server with the settings in `SHOAL_*` variables."""
    from agent import __version__

    parser = argparse.ArgumentParser(
        prog="shoal-server",
        description="Runs the fleet server until Ctrl-C: the REST API, its pages at /docs, and the devices' gateway.",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.description = "\n".join(textwrap.wrap(str(parser.description), _width()))
    parser.add_argument("--version", action="version", version=f"shoal-server {__version__}")
    parser.parse_args()
    sys.exit(run({}))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100) - 2


def _settings_help() -> str:
    """Every variable with its meaning and default."""
    lines = ["settings, by environment variables:"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" [default: {field.default}]"
        text = f"{field.description}{default}"
        lines += [
            f"  SHOAL_{name.upper()}",
            *textwrap.wrap(text, _width() - 6, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join([*lines, "", "example: SHOAL_STATE_DIR=./state SHOAL_PORT=7470 shoal-server"])


def run(options: dict[str, Any]) -> int:
    """Run until interrupted.

    Args:
        options: settings that were given on the command line; they win over the environment.

    Returns:
        An exit status: 0, 1 when it could not start, 2 for settings that are not usable.
    """
    try:
        settings = Settings(**options)
    except ValidationError as error:
        for problem in error.errors():
            name = "SHOAL_" + str(problem["loc"][0]).upper() if problem["loc"] else "settings"
            print(f"{name}: {problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)  # noqa: T201
        return 2
    return _serve(settings)


def _serve(settings: Settings) -> int:
    """Run with settings that are usable. What that imports takes seconds: who mistyped one has been told by now."""
    # What is made from here to the end of the start stays: to look for garbage in it takes a seventh of the start, and
    # later a part of every collection.
    gc.disable()
    import logging

    import uvicorn

    from agent.protocol.logs import log_to_stderr
    from agent.sd_notify import ServiceManager
    from fleet_server.access.bootstrap import FILE as ADMIN_TOKEN_FILE
    from fleet_server.app import create_app, running
    from fleet_server.cli.http_server import HttpServer
    from fleet_server.errors import FleetError
    from fleet_server.trust.https import https_certificate

    log_to_stderr(settings.log_level, settings.log_format)
    for chatty in ("httpx", "alembic.runtime.migration", "alembic.runtime.plugins"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    log = logging.getLogger("shoal")
    scheme = "https" if settings.tls else "http"
    log.info("REST API: %s://%s:%d/api/v1, its pages: /docs", scheme, settings.host, settings.port)
    log.info("devices connect to %s; state is in %s", settings.effective_broker_url, settings.state_dir)
    if settings.admin_token is None:
        log.info("the admin's token is in %s", settings.state_dir / ADMIN_TOKEN_FILE)
    for warning in _insecure(settings):
        log.warning("%s", warning)
    app = create_app(settings)
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=settings.trusted_proxies or "",
        timeout_graceful_shutdown=10,
    )
    # uvicorn raises the signal that ended it once more when it is done; what runs beside it is to be stopped first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        with running(app):
            if settings.tls:
                config.ssl_certfile, config.ssl_keyfile = https_certificate(settings, app.state.authority.ca)

            manager, let_go = ServiceManager(os.environ), app.state.log_streams.stop
            server = HttpServer(config, manager, let_go, app.state.drain, settings.drain_s)
            server.run()
    except FleetError as error:
        log.error("the server can't start: %s", error.detail)  # noqa: TRY400 (a sentence for people, no traceback)
        return 1
    return 0 if server.started else 1


def _insecure(settings: Settings) -> list[str]:
    """What is right for trying things out on one machine only."""
    found = []
    if not settings.broker_tls:
        where = "SHOAL_BROKER_URL" if settings.broker_url else "the embedded broker"
        found.append(
            f"INSECURE: {where} is used without devices' certificates: whoever reaches it may pass for any device, and "
            "for this server (SHOAL_BROKER_TLS)"
        )
    if not settings.tls and not is_loopback(settings.host):
        found.append("INSECURE: the API is reachable from other machines without TLS: tokens can be read (SHOAL_TLS)")
    return found


if __name__ == "__main__":
    main()
