"""Which root a device was given: its configuration's before its enrolment's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.config import Config
from agent.errors import IdentityError
from agent.identity import CURRENT, Identity, identity_folder, save_identity
from agent.update.verify import given_root


def test_the_configured_file_comes_before_what_enrolling_gave(tmp_path: Path) -> None:
    assert given_root(Config("d", tmp_path)) is None
    save_identity(identity_folder(tmp_path), Identity("d", "", "", trust_root={"signed": {"version": 3}}))
    assert json.loads(given_root(Config("d", tmp_path)) or b"") == {"signed": {"version": 3}}
    (tmp_path / "root.json").write_bytes(b"configured")
    assert given_root(Config("d", tmp_path, root_file=str(tmp_path / "root.json"))) == b"configured"


def test_what_can_not_be_read_is_no_reason_to_trust_the_next_best(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        given_root(Config("d", tmp_path, root_file=str(tmp_path / "absent")))
    identity_folder(tmp_path).mkdir()
    (identity_folder(tmp_path) / CURRENT).write_text("{")
    with pytest.raises(IdentityError):
        given_root(Config("d", tmp_path))
