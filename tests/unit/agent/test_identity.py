"""Who a device is survives the damage of a file: nobody walks there to enrol it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import IdentityError
from agent.identity import COPY, CURRENT, NEXT, Identity, load_identity, save_identity

OLD, NEW = (Identity("dev-1", "key", digest * 64) for digest in "ab")


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 700, b'{"device_id": 1}'])
def test_its_copy_stands_in_for_a_damaged_file(tmp_path: Path, damage: bytes) -> None:
    save_identity(tmp_path, OLD)
    save_identity(tmp_path, NEW)
    (tmp_path / CURRENT).write_bytes(damage)
    assert load_identity(tmp_path) == NEW
    save_identity(tmp_path, OLD)
    assert load_identity(tmp_path) == OLD
    (tmp_path / COPY).write_bytes(damage)
    assert load_identity(tmp_path) == OLD
    (tmp_path / CURRENT).write_bytes(damage)
    with pytest.raises(IdentityError, match=f"{CURRENT} is damaged.*enrol again"):
        load_identity(tmp_path)


def test_one_that_was_removed_is_gone_and_one_that_is_being_got_has_no_copy(tmp_path: Path) -> None:
    save_identity(tmp_path, OLD)
    (tmp_path / CURRENT).unlink()
    assert load_identity(tmp_path) is None
    save_identity(tmp_path, NEW, NEXT)
    assert load_identity(tmp_path, NEXT) == NEW
    (tmp_path / NEXT).write_bytes(b"{")
    with pytest.raises(IdentityError):
        load_identity(tmp_path, NEXT)
