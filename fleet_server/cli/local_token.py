"""An enrolment token for the agent of the server's own machine: `python -m fleet_server.cli.local_token FILE`.

The server's package runs it as the server's user (deploy/systemd/shoal-local-token.service), with the server's own
settings: so it knows where the API is, and may read the admin's token. The file holds what `shoal-agent enroll` needs,
as variables, and is its owner's and root's alone.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from fleet_server.access.bootstrap import FILE as ADMIN_TOKEN_FILE
from fleet_server.addresses import is_loopback
from fleet_server.sdk.client import Client
from fleet_server.sdk.errors import ApiError, UnreachableError
from fleet_server.settings import Settings

LIVES_S = 600
WAIT_S = 60.0
EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104 (compared with, not bound to)


def main() -> None:
    """Write the file, or say why not."""
    if len(sys.argv) != 2:
        sys.exit("name the file to write")
    try:
        write_token(Settings(), Path(sys.argv[1]))
    except ValidationError as error:
        sys.exit(f"the server's settings are not usable: {error}")
    except (ApiError, OSError) as error:
        sys.exit(f"no enrolment token could be made: {error}")


def write_token(settings: Settings, file: Path, wait_s: float = WAIT_S) -> None:
    """Ask the server of these settings for a token for one device, and write it beside the server's address.

    Args:
        settings: the server's.
        file: to write; its folder is there.
        wait_s: how long the server may take until it answers, in seconds.

    Raises:
        ApiError: when it refuses, or does not answer in that time.
        OSError: when the admin's token can't be read, or the file not be written.
    """
    url = local_url(settings)
    given = settings.admin_token
    token = given.get_secret_value() if given else (settings.state_dir / ADMIN_TOKEN_FILE).read_text().strip()
    own_ca = settings.tls and settings.tls_cert is None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with Client(url, token, ca_file=settings.state_dir / "ca" / "ca.pem" if own_ca else None) as api:
                made = api.post("/enrolment-tokens", {"uses": 1, "ttl_s": LIVES_S})
            break
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    draft = file.with_name(f".{file.name}.part")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(f"SHOAL_ENROLMENT_SERVER={url}\nSHOAL_AGENT_TOKEN={made['token']}\n")
    draft.replace(file)


def local_url(settings: Settings) -> str:
    """Where programs on the server's machine reach its API: on loopback wherever it listens there."""
    host = "127.0.0.1" if settings.host in EVERYWHERE else settings.host
    if settings.tls_cert is not None and is_loopback(host):
        host = settings.server_names[0]  # a certificate from elsewhere is for a name
    return f"{'https' if settings.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{settings.port}"


if __name__ == "__main__":
    main()
