"""Download tickets: what one was made for, for as long, and by nobody else."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from fleet_server.errors import UnauthorizedError
from fleet_server.trust.ca import FleetCa
from fleet_server.trust.tickets import LIFETIME_S, TicketDesk

DIGEST = "a" * 64


@pytest.fixture
def desk(tmp_path: Path) -> TicketDesk:
    return TicketDesk(FleetCa.open(tmp_path / "ca", "f"))


def test_every_server_with_the_ca_reads_it(desk: TicketDesk, tmp_path: Path) -> None:
    text = desk.issue("camera.1", DIGEST, 5, 100.0)
    found = TicketDesk(FleetCa.open(tmp_path / "ca", "f")).read(text, DIGEST, 100.0 + LIFETIME_S - 1)
    assert (found.device_id, found.digest, found.size) == ("camera.1", DIGEST, 5)
    with pytest.raises(UnauthorizedError, match="no ticket of this server"):
        TicketDesk(FleetCa.open(tmp_path / "another", "f")).read(text, DIGEST, 100.0)


def test_it_counts_for_one_content_and_a_while(desk: TicketDesk) -> None:
    text = desk.issue("camera-1", DIGEST, 5, 100.0)
    with pytest.raises(UnauthorizedError, match="expired"):
        desk.read(text, DIGEST, 100.0 + LIFETIME_S)
    with pytest.raises(UnauthorizedError, match="another artifact"):
        desk.read(text, "b" * 64, 100.0)


def test_what_was_changed_does_not_count(desk: TicketDesk) -> None:
    claim, _, mac = desk.issue("camera-1", DIGEST, 5, 100.0).partition(".")
    said = json.loads(base64.urlsafe_b64decode(claim + "=="))
    forged = base64.urlsafe_b64encode(json.dumps(said | {"expires_at": 1e12}).encode()).decode().rstrip("=")
    for text in (f"{forged}.{mac}", f"{claim}.", f".{mac}", claim, "", ".", "ä.ö", f"{claim}.{mac}A" * 50):
        with pytest.raises(UnauthorizedError, match="no ticket of this server"):
            desk.read(text, DIGEST, 100.0)
