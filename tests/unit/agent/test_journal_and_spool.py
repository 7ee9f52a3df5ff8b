"""What is on a device's disk survives a killed process, in real SQLite files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.protocol.codec import decode
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import HostWindow, TelemetryAck, TelemetryBatch
from agent.protocol.version import SPOKEN
from agent.telemetry import spool as spool_module
from agent.telemetry.pace import SendPace
from agent.telemetry.spool import Spool
from agent.update.journal import Journal
from agent.update.updater import Record
from tests.unit.agent.test_store_and_download import manifest

ROOT = Path(__file__).parents[3]


def batch(spool_id: str, sequence: int) -> TelemetryBatch:
    host = HostWindow(cpu_percent=1.0)
    return TelemetryBatch(SPOKEN, spool_id, sequence, 0.0, 1.0, (), host)


def killed(code: str) -> None:
    """Run code that ends by SIGKILL."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == -9


def test_the_journal_is_as_it_was_before_the_kill(tmp_path: Path) -> None:
    killed(
        f"""
from pathlib import Path
from agent.protocol.lifecycle import Phase
from agent.update.journal import Journal
from agent.update.updater import Record
from tests.unit.agent.test_store_and_download import manifest
journal = Journal(Path({str(tmp_path / "journal.db")!r}))
one = Record("one", manifest(b"1"), 1.0, 2.0, traceparent="of a span")
one.mark("pending", 5.0)
two = Record("two", manifest(b"2"), 1.0, 2.0, received_bytes=77)
journal.save({{"one": one, "two": two}})
one.phase = Phase.ACTIVE
journal.save({{"one": one}})
journal.keep_number("revision", 41)
"""
    )
    journal = Journal(tmp_path / "journal.db")
    records = journal.load()
    assert list(records) == ["one", "two"]
    assert records["one"].phase is Phase.ACTIVE
    assert records["one"].marks == (("pending", 5.0),)
    records["two"].mark("pending", 6.0)
    assert records["two"].marks == (), "nobody traces it"
    assert records["two"] == Record("two", manifest(b"2"), 1.0, 2.0, received_bytes=77)
    assert journal.number("revision", 0) == 41
    journal.forget(["one"])
    journal.close()
    assert list(Journal(tmp_path / "journal.db").load()) == ["two"]


def test_batches_stay_until_they_are_acknowledged_and_keep_their_numbers(tmp_path: Path) -> None:
    killed(
        f"""
from pathlib import Path
from agent.telemetry.spool import Spool
from tests.unit.agent.test_journal_and_spool import batch
spool = Spool(Path({str(tmp_path / "spool.db")!r}))
for _ in range(3):
    spool.add(batch)
"""
    )
    spool = Spool(tmp_path / "spool.db", SendPace(first_s=10.0))
    first = spool.due(100.0)
    assert [sequence for sequence, _ in first] == [1, 2, 3]
    earlier = decode(first[0][1], TelemetryBatch).spool_id
    assert decode(first[0][1], TelemetryBatch) == batch(earlier, 1)
    assert earlier != spool.spool_id
    assert spool.due(105.0) == []
    spool.acknowledge(TelemetryAck(spool_id="another", sequences=(1,)))
    spool.acknowledge(TelemetryAck(spool_id=earlier, sequences=(1, 3)))
    assert [sequence for sequence, _ in spool.due(111.0)] == [2]
    spool.acknowledge(TelemetryAck(spool_id=earlier, sequences=(2,)))
    spool.add(batch)
    (left,) = spool.due(200.0)
    assert decode(left[1], TelemetryBatch) == batch(spool.spool_id, 1)
    spool.close()


def test_what_gathered_is_sent_no_faster_than_it_is_stored(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    for _ in range(50):
        spool.add(batch)

    def sent(now: float) -> list[int]:
        return [decode(one, TelemetryBatch).sequence for _, one in spool.due(now)]

    def stored(*sequences: int) -> None:
        spool.acknowledge(TelemetryAck(spool.spool_id, sequences))

    assert [sent(0.0), sent(1.0)] == [[1, 2, 3, 4], []]
    stored(1, 3, 4)
    assert [sent(2.0), sent(3.0)] == [[5, 6, 7, 8, 9, 10, 11], []]  # two times as many on their way as before
    stored(5, 6, 7, 8, 9, 10, 11)
    assert sent(4.0) == list(range(12, 27))
    stored(*range(12, 27))
    assert len(sent(5.0)) == 19  # twenty with the second one, at most
    spool.close()


def test_a_server_that_is_behind_is_sent_less_and_less(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    for _ in range(50):
        spool.add(batch)

    def sent(now: float) -> list[int]:
        return [decode(one, TelemetryBatch).sequence for _, one in spool.due(now)]

    assert sent(0.0) == [1, 2, 3, 4]
    times = [now for now in range(1, 700) if sent(now) == [1]]
    assert times == [15, 45, 105, 225, 345, 465, 585]
    spool.acknowledge(TelemetryAck(spool.spool_id, (1, 2)))  # what was sent first was under way all the time
    assert [sent(700.0), sent(714.0)] == [[3, 4], []]
    spool.pace.link_up()
    assert sent(714.0) == [5, 6]
    spool.close()


def test_a_device_that_is_offline_for_long_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "LIMIT", 4)
    spool = Spool(tmp_path / "spool.db")
    for _ in range(12):
        spool.add(batch)
    assert [sequence for sequence, _ in spool.due(1e9)] == [9, 10, 11, 12]
    spool.close()
