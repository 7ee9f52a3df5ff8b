"""The agent of the server's own machine: the token that the server's package makes for it, against a real server."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from fleet_server.cli.local_token import local_url, write_token
from fleet_server.sdk.errors import AuthError, UnreachableError
from fleet_server.settings import Settings
from tests.fleet import LocalFleet, free_port


def test_a_token_is_for_one_device_and_for_root_and_its_owner(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path, tls=True)
    try:
        fleet.start_server()
        settings = Settings(state_dir=tmp_path / "server", port=fleet.port, tls=True)
        file = tmp_path / "enrolment.env"
        file.write_text("an earlier one, which was not used")
        file.chmod(0o644)
        write_token(settings, file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found = dict(line.split("=", 1) for line in file.read_text().splitlines())
        assert found["SHOAL_ENROLMENT_SERVER"] == fleet.url
        first = fleet.enroll("first", token=found["SHOAL_AGENT_TOKEN"], server=found["SHOAL_ENROLMENT_SERVER"])
        assert first.returncode == 0, first.stderr
        second = fleet.enroll("second", token=found["SHOAL_AGENT_TOKEN"])
        assert second.returncode != 0
        assert "used up" in second.stderr
        with pytest.raises(AuthError):
            write_token(settings.model_copy(update={"admin_token": SecretStr("not-the-admins")}), file)
    finally:
        fleet.stop()


def test_without_a_server_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "admin-token").write_text("shoal_admin_none\n")
    settings = Settings(state_dir=tmp_path, port=free_port())
    with pytest.raises(UnreachableError):
        write_token(settings, tmp_path / "enrolment.env", wait_s=0.0)
    assert not (tmp_path / "enrolment.env").exists()
    (tmp_path / "admin-token").unlink()
    with pytest.raises(FileNotFoundError, match="admin-token"):
        write_token(settings, tmp_path / "enrolment.env", wait_s=0.0)


def test_the_server_is_reached_on_loopback_wherever_it_listens_there() -> None:
    assert local_url(Settings()) == "http://127.0.0.1:7470"
    everywhere = Settings(host="0.0.0.0", admin_token="a-long-token", tls=True, port=443)
    assert local_url(everywhere) == "https://127.0.0.1:443"
    assert local_url(Settings(host="::1")) == "http://[::1]:7470"
