"""Commands on a device, without one: the log's ring, the book, the desk, replacements, configuration, bounds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.commands.book import KEPT, CommandBook
from agent.commands.config import CommandConfig, read_commands
from agent.commands.desk import MOST_READERS, CommandDesk
from agent.commands.execution import Outcome
from agent.commands.following import Following
from agent.commands.ring import LINES, TEXT_CHARS, LogRing, RingHandler
from agent.database import DatabaseError
from agent.errors import ConfigError
from agent.protocol.codec import decode, encode
from agent.protocol.commands import (
    LEVELS,
    Command,
    CommandAnswer,
    CommandArguments,
    CommandKind,
    CommandPhase,
    CommandResult,
    LogLine,
    ModelBenchmark,
)
from agent.protocol.errors import WireError
from agent.protocol.limits import LIMITS
from agent.replacement import ENDS_WITHIN_S, QUIET_S, Replacement
from agent.update.journal import Journal

ALL = {kind.value: True for kind in CommandKind}


# -- the ring


def filled(*texts: tuple[str, str]) -> LogRing:
    ring = LogRing()
    for level, text in texts:
        ring.add(1.0, level, "agent", "a", text)
    return ring


def test_a_ring_is_bounded_and_says_what_is_gone() -> None:
    ring = LogRing()
    for number in range(LINES + 10):
        ring.add(1.0, "INFO", "agent", "a", str(number))
    lines, after, gone = ring.after(0, "DEBUG", LINES * 2)
    assert (len(lines), after, gone) == (LINES, LINES + 10, 0)
    assert ring.after(4, "DEBUG", 1)[2] == 6
    long = filled(*[("INFO", "x" * 5000)] * 1000)
    lines, _, _ = long.after(0, "DEBUG", 5000)
    assert {len(one.text) for one in lines} == {TEXT_CHARS}
    assert len(lines) < 1000


def test_levels_narrow_what_is_read_and_the_rest_is_gone_past() -> None:
    ring = filled(("INFO", "1"), ("ERROR", "2"), ("INFO", "3"), ("WARNING", "4"), ("DEBUG", "5"))
    start = ring.newest(2, "WARNING")
    lines, after, gone = ring.after(start, "WARNING", 10)
    assert ([one.text for one in lines], after, gone) == (["2", "4"], 5, 0)
    assert ring.newest(0, "INFO") == 5
    assert ring.newest(99, "INFO") == 0
    assert [one.text for one in ring.after(0, "INFO", 2)[0]] == ["1", "2"]


@given(st.text(max_size=50), st.text(max_size=200))
def test_whatever_is_logged_can_be_sent(logger: str, text: str) -> None:
    ring = filled()
    ring.add(0.0, "Level 7", "worker", logger, text)
    answer = CommandAnswer("c", CommandPhase.RUNNING, lines=tuple(ring.after(0, "DEBUG", 10)[0]))
    assert decode(encode(answer), CommandAnswer) == answer


def test_the_largest_batch_is_within_a_message() -> None:
    ring = filled(*[("INFO", "\U0001f41f" * TEXT_CHARS)] * LIMITS.log_batch)
    lines = tuple(ring.after(0, "INFO", LIMITS.log_batch)[0])
    assert len(lines) == LIMITS.log_batch
    assert len(encode(CommandAnswer("c" * 40, CommandPhase.RUNNING, lines=lines))) < LIMITS.message_bytes


def test_what_is_logged_wrongly_ends_nothing() -> None:
    taken: list[Any] = []
    handler = RingHandler(lambda *record: taken.append(record))
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "%d", ("x",), None))
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "token=%s", ("abcdefgh",), None))
    assert [record[3] for record in taken] == ["token=…"]


def test_without_a_link_a_batch_is_said_again() -> None:
    ring, said, linked = filled(("INFO", "1")), [], False

    def say(answer: CommandAnswer) -> bool:
        if linked:
            said.append([one.text for one in answer.lines])
        return linked

    reader = Following("c", CommandArguments(follow=True), ring, say)
    assert reader.step(0.0) is None
    ring.add(1.0, "INFO", "agent", "a", "2")
    linked = True
    assert reader.step(1.0) is None
    assert said == [["1", "2"]]
    assert reader.step(2.0) is None
    assert said == [["1", "2"]], "nothing new is not told"
    over = reader.end()
    assert over is not None
    assert over.result == CommandResult(lines=2)


# -- the book and the desk


class Execution:
    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.ended = False

    def step(self, now: float) -> Outcome | None:
        return self.outcome

    def end(self) -> Outcome | None:
        self.ended = True
        return None


class Device:
    """A desk with a journal in a folder."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.db")
        self.said: list[CommandAnswer] = []
        self.begun: list[Execution] = []
        self.desk = CommandDesk(
            CommandBook(self.journal),
            ALL,
            dict.fromkeys(CommandKind, self._begin),
            lambda one: not self.said.append(one),
        )

    def _begin(self, command: Command, now: float) -> Execution:
        self.begun.append(Execution())
        return self.begun[-1]

    def receive(self, command_id: str, kind: str = "facts", *, cancel: bool = False, **fields: Any) -> None:
        command = Command(command_id, kind, 60.0, 100.0, cancel=cancel)
        self.desk.received(msgspec.structs.replace(command, **fields), 0.0, 50.0)

    @property
    def phases(self) -> list[tuple[str, str]]:
        return [(one.command_id, one.phase.value) for one in self.said]


def test_a_command_is_carried_out_once_however_often_it_comes(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.receive("c1")
    device.receive("c1")
    assert len(device.begun) == 1
    device.begun[0].outcome = Outcome(CommandPhase.SUCCEEDED, result=CommandResult(changed=("link",)))
    device.desk.tick(1.0)
    device.receive("c1")
    device.receive("c1", cancel=True)
    assert device.phases == [("c1", "running")] * 2 + [("c1", "succeeded")] * 3
    device.journal.close()
    again = Device(tmp_path)
    again.receive("c1")
    assert (again.begun, again.said) == ([], device.said[-1:])


def test_what_was_going_on_when_the_agent_ended_has_failed(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.receive("c1")
    device.desk.stop()
    assert device.begun[0].ended
    device.journal.close()
    for _ in range(2):
        again = Device(tmp_path)
        again.receive("c1")
        assert (again.said[0].phase, again.said[0].code) == (CommandPhase.FAILED, "interrupted")
        assert again.begun == []
        again.journal.close()


def test_a_journal_that_can_not_be_written_keeps_what_might_be_done_twice_from_being_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path)

    def full(_records: dict[str, bytes]) -> None:
        import sqlite3

        raise DatabaseError(tmp_path, sqlite3.OperationalError("disk full"))

    monkeypatch.setattr(device.journal, "save_commands", full)
    device.receive("c1", "restart-runtime")
    assert (device.said[-1].phase, device.said[-1].code) == (CommandPhase.REFUSED, "store_error")
    device.receive("c2", "logs")
    assert device.phases[-1] == ("c2", "running")


def test_too_many_at_a_time_are_refused_and_one_that_fails_fails_alone(tmp_path: Path) -> None:
    device = Device(tmp_path)
    for number in range(MOST_READERS + 1):
        device.receive(f"l{number}", "logs")
    assert [phase for _, phase in device.phases] == ["running"] * MOST_READERS + ["refused"]

    def broken(_now: float) -> Outcome | None:
        raise ZeroDivisionError("oops")

    device.begun[0].step = broken  # type: ignore[method-assign]
    device.desk.tick(1.0)
    assert (device.said[-1].phase, device.said[-1].code) == (CommandPhase.FAILED, "internal")
    device.desk.tick(61.0)
    assert {one.phase for one in device.said[-2:]} == {CommandPhase.TIMED_OUT}


def test_the_oldest_are_forgotten(tmp_path: Path) -> None:
    device = Device(tmp_path)
    for number in range(KEPT + 3):
        device.receive(f"c{number}", "explode")
    assert len(device.journal.commands()) == KEPT
    assert "c2" not in device.journal.commands()


# -- replacements


def test_a_replacement_is_over_when_the_new_one_serves_the_same_or_will_not() -> None:
    new = Replacement(frozenset({"a", "b"}), 0.0)
    assert not new.looked(frozenset({"a", "b"}), 0.5, loading=False), "the old one is still there"
    assert new.ended(1.0)
    assert not new.ended(1.5), "that was the new one"
    assert not new.looked(frozenset({"a"}), 2.0, loading=True)
    assert new.looked(frozenset({"a", "b"}), 3.0, loading=False)
    assert (new.over, new.serves, new.took_s) == (True, {"a", "b"}, 3.0)
    missing = Replacement(frozenset({"a", "b"}), 0.0)
    missing.ended(1.0)
    assert not missing.looked(frozenset({"a"}), 2.0, loading=False)
    assert missing.looked(frozenset({"a"}), 2.0 + QUIET_S, loading=False)
    assert missing.serves == {"a"}
    stuck = Replacement(frozenset(), 0.0)
    assert [stuck.kills(at) for at in (1.0, ENDS_WITHIN_S)] == [False, True]


# -- configuration and messages


def test_what_an_owner_allows() -> None:
    assert read_commands({}) == CommandConfig()
    found = read_commands({"restart_runtime": False, "identify_program": ["/bin/true", "-x"]})
    assert found.allowed == {**ALL, "restart-runtime": False}
    assert found.identify_program == ("/bin/true", "-x")
    for wrong, name in (
        ({"logs": "no"}, r"commands\.logs"),
        ({"restart-runtime": False}, r"commands\.restart-runtime"),
        ({"identify_program": "blink"}, r"commands\.identify_program"),
        ({"identify_program": [""]}, r"commands\.identify_program"),
    ):
        with pytest.raises(ConfigError, match=name):
            read_commands(wrong)


LINE = LogLine(1, 1.0, "INFO", "agent", "a", "x")


@pytest.mark.parametrize(
    "message",
    [
        Command("", "logs", 1.0, 1.0),
        Command("c", "x" * 200, 1.0, 1.0),
        Command("c", "logs", 0.0, 1.0),
        Command("c", "logs", 1.0, -1.0),
        Command("c", "logs", 1.0, 1.0, CommandArguments(lines=-1)),
        Command("c", "logs", 1.0, 1.0, CommandArguments(level="LOUD")),
        Command("c", "benchmark", 1.0, 1.0, CommandArguments(seconds=0.0)),
        Command("c", "benchmark", 1.0, 1.0, CommandArguments(models=("m",) * 100)),
        CommandAnswer("c", CommandPhase.RUNNING, detail="x" * 3000),
        CommandAnswer("c", CommandPhase.RUNNING, lines=(LINE,) * 201),
        CommandAnswer("c", CommandPhase.RUNNING, lines=(msgspec.structs.replace(LINE, text="\0"),)),
        CommandAnswer("c", CommandPhase.RUNNING, lines=(msgspec.structs.replace(LINE, level="x"),)),
        CommandAnswer("c", CommandPhase.RUNNING, dropped=-1),
        CommandAnswer("c", CommandPhase.FAILED, result=CommandResult(took_s=-1.0)),
        CommandAnswer("c", CommandPhase.FAILED, result=CommandResult(output="x" * 3000)),
        CommandAnswer("c", CommandPhase.FAILED, result=CommandResult(benchmarks=(ModelBenchmark("m", "1", runs=-1),))),
    ],
)
def test_what_is_out_of_bounds_is_refused(message: Command | CommandAnswer) -> None:
    with pytest.raises(WireError):
        decode(encode(message), type(message))


def test_peers_that_know_more_or_less_are_understood() -> None:
    newer = b'{"command_id": "c", "kind": "polish", "timeout_s": 1, "expires_at": 2, "arguments": {"shine": 3}, "x": 1}'
    assert decode(newer, Command) == Command("c", "polish", 1.0, 2.0)
    older = b'{"command_id": "c", "phase": "succeeded"}'
    assert decode(older, CommandAnswer) == CommandAnswer("c", CommandPhase.SUCCEEDED)
    assert LEVELS[0] == "DEBUG"
