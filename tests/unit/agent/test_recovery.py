"""What the agent finds on its disk after the worst: damaged databases, lost files, a disk with no room."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

import agent.files
from agent.database import DatabaseError
from agent.files import remove_leftovers, set_aside, write_durably
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import HostWindow, TelemetryBatch
from agent.protocol.version import SPOKEN
from agent.telemetry.spool import Spool
from agent.update.journal import Journal
from agent.update.lastgood import KEPT, LastGood
from agent.update.store import ArtifactStore
from agent.update.updater import Record
from tests.unit.agent.test_store_and_download import chunks, manifest, write_all


def record(key: str, content: bytes, phase: Phase = Phase.ACTIVE) -> Record:
    return Record(key, manifest(content), 1.0, 2.0, phase=phase)


def batch(spool_id: str, sequence: int) -> TelemetryBatch:
    return TelemetryBatch(SPOKEN, spool_id, sequence, 0.0, 1.0, (), HostWindow())


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def test_a_damaged_journal_is_set_aside_and_at_most_two_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for _ in range(4):
        journal = Journal(path)
        journal.save({"one": record("one", b"1")})
        journal.close()
        noise(path)
    journal = Journal(path)
    assert journal.load() == {}
    assert "set aside" in journal.lost
    assert not journal.unwritable
    journal.save({"two": record("two", b"2")})
    journal.close()
    assert len(list(tmp_path.glob("journal.db.corrupt-*"))) == 2
    again = Journal(path)
    assert list(again.load()) == ["two"]
    assert again.lost == ""
    again.close()


def test_one_record_that_makes_no_sense_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    journal.save({"one": record("one", b"1"), "two": record("two", b"2")})
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE deployments SET record = 'no record' WHERE id = 'one'")
    database.close()
    journal = Journal(path)
    assert list(journal.load()) == ["two"]
    assert "one" in journal.lost
    journal.close()


def test_a_journal_that_is_damaged_while_it_is_open_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    journal.save({str(number): record(str(number), b"1") for number in range(50)})
    journal.close()
    journal = Journal(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(20_000))
    journal._db.execute("PRAGMA shrink_memory")  # or it would go on with the pages that it has read
    records = {str(number): record(str(number), b"2") for number in range(50)}
    with pytest.raises(DatabaseError) as found:
        journal.save(records)
    assert found.value.damaged
    assert not journal.renew()
    journal.save({"one": record("one", b"1")})
    assert list(journal.load()) == ["one"]
    journal.close()


def test_where_no_file_can_be_the_journal_stands_in_memory_until_one_can(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal.db"
    journal = Journal(path)
    assert journal.unwritable
    journal.save({"one": record("one", b"1")})
    assert journal.renew()
    assert journal.unwritable
    path.parent.mkdir()
    assert journal.renew()
    assert not journal.unwritable
    journal.close()
    again = Journal(path)
    assert list(again.load()) == ["one"]
    again.close()


def test_a_damaged_spool_is_set_aside_and_one_in_memory_comes_to_the_disk(tmp_path: Path) -> None:
    noise(tmp_path / "spool.db")
    spool = Spool(tmp_path / "spool.db")
    assert "set aside" in spool.lost
    spool.add(batch)
    spool.close()
    late = Spool(tmp_path / "folder" / "spool.db")
    assert late.unwritable
    for _ in range(3):
        late.add(batch)
    (tmp_path / "folder").mkdir()
    late.renew()
    assert not late.unwritable
    late.add(batch)
    assert len(late.due(1.0)) == 4
    late.close()


def test_batches_that_are_dropped_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.telemetry.spool.LIMIT_BYTES", 1000)
    spool = Spool(tmp_path / "spool.db")
    for _ in range(50):
        spool.add(batch)
    spool.pace.limit = 100
    kept = len(spool.due(1.0))
    assert 0 < kept < 50
    assert spool.dropped == 50 - kept
    spool.close()


def test_a_clock_that_is_set_back_does_not_hold_telemetry_up(tmp_path: Path) -> None:
    """What was sent is remembered by the clock that is never set, and by nothing that outlives the agent."""
    spool = Spool(tmp_path / "spool.db")
    spool.add(batch)
    assert spool.due(5000.0)
    spool.close()
    again = Spool(tmp_path / "spool.db")
    assert again.due(3.0)
    again.close()


def test_what_served_well_is_known_and_what_did_badly_is_not(tmp_path: Path) -> None:
    good = LastGood(tmp_path / "serving.json")
    records = [record(str(number), bytes([number])) for number in range(KEPT + 2)]
    for one in records:
        good.update([one])
    assert [one.deployment_id for one in good.of("m")] == ["5", "4", "3", "2"]
    assert good.needed() == {one.manifest.digest for one in records[-2:]}
    assert good.useful() == [one.manifest.digest for one in (records[3], records[2])]
    records[-1].phase = Phase.ROLLED_BACK
    good.update(records)
    assert LastGood(tmp_path / "serving.json").of("m")[0].deployment_id == "4"
    good.retain(["other"])
    assert LastGood(tmp_path / "serving.json").models == []


def test_a_damaged_list_of_what_served_well_is_set_aside(tmp_path: Path) -> None:
    noise(tmp_path / "serving.json")
    good = LastGood(tmp_path / "serving.json")
    assert good.models == []
    assert good.lost
    good.update([record("1", b"1")])
    assert LastGood(tmp_path / "serving.json").models == ["m"]


def test_a_power_cut_costs_what_was_not_synced_and_a_killed_agent_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot"
    boot.write_text("0" * 31 + "1")
    monkeypatch.setattr(agent.files, "BOOT_ID", boot)
    content = bytes(range(80))
    store = ArtifactStore(tmp_path / "store")
    part = store.open_part(manifest(content))
    pieces = chunks(content)
    for index in (0, 1):
        part.write(index, pieces[index])
    part.sync()
    part.write(2, pieces[2])
    part.close()
    killed = store.open_part(manifest(content))
    assert killed.missing == len(pieces) - 3
    killed.close()
    boot.write_text("0" * 31 + "2")
    cut = store.open_part(manifest(content))
    assert cut.missing == len(pieces) - 2
    write_all(cut, content)
    assert cut.finish()


def test_room_is_made_of_what_is_only_useful_the_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path, floor_bytes=1000, keep_bytes=1 << 20)
    kept = [manifest(bytes([number]) * 5000).digest for number in range(4)]
    for digest in kept:
        store.path(digest).write_bytes(b"x" * 5000)
    store.collect_garbage(kept[:2], kept[2:])
    assert all(store.has(digest) for digest in kept)
    free = [3000]
    monkeypatch.setattr(store, "_free", lambda: free[0] + 8192 * sum(not store.has(digest) for digest in kept))
    assert store.make_room(manifest(b"n" * 9000)) == 0
    assert [store.has(digest) for digest in kept] == [True, True, True, False]
    assert store.make_room(manifest(b"n" * 100_000)) == 100_000 + 1000 - 3000 - 2 * 8192
    assert [store.has(digest) for digest in kept] == [True, True, False, False]


def test_what_does_not_fit_into_the_allowance_goes(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, keep_bytes=9000)
    digests = [manifest(bytes([number])).digest for number in range(3)]
    for digest in digests:
        store.path(digest).write_bytes(b"x" * 4000)
    store.collect_garbage([], digests)
    assert [store.has(digest) for digest in digests] == [True, True, False]


def test_half_written_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"whole")
    (tmp_path / ".file.99999999.tmp").write_bytes(b"ha")
    (tmp_path / ".file.1.tmp").write_bytes(b"still being written by process 1")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.1.tmp", "file"]
    assert set_aside(tmp_path / "file").read_bytes() == b"whole"
