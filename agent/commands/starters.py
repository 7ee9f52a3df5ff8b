"""The commands of a whole device: how each is begun with the parts that the supervisor has."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable

from agent.commands.benchmarking import Benchmarking
from agent.commands.book import CommandBook
from agent.commands.desk import CommandDesk
from agent.commands.execution import Execution
from agent.commands.following import Following
from agent.commands.identifying import Identifying, Unidentified
from agent.commands.measuring import MeasuringFacts
from agent.commands.restarting import Restarting
from agent.commands.ring import LogRing
from agent.config import Config
from agent.head_start import MEMORY_SETTINGS
from agent.inference import Inference
from agent.protocol.commands import Command, CommandAnswer, CommandKind
from agent.protocol.facts import DeviceFacts
from agent.update.journal import Journal
from agent.update.store import ArtifactStore

log = logging.getLogger("agent.commands")
FOLDER = "benchmark"


def open_desk(
    config: Config,
    journal: Journal,
    inference: Inference,
    store: ArtifactStore,
    ring: LogRing,
    *,
    say: Callable[[CommandAnswer], bool],
    measure: Callable[[], DeviceFacts],
    take_facts: Callable[[DeviceFacts], tuple[str, ...]],
) -> tuple[CommandDesk, CommandBook]:
    """The desk, and its book.

    Args:
        config: what the owner allows.
        journal: where the book is kept.
        inference: what is restarted and benchmarked.
        store: where artifacts are.
        ring: the newest log records.
        say: says an answer to the server; false when there is no link.
        measure: measures the facts, in whatever thread.
        take_facts: takes new facts in, and gives the names of those that are others now.

    Raises:
        DatabaseError: when the journal can't be read.
    """

    def benchmark(command: Command, now: float) -> Execution:
        return Benchmarking(
            inference,
            command.arguments.models,
            store,
            config.state_dir / FOLDER,
            seconds=command.arguments.seconds,
            environment=MEMORY_SETTINGS,
            now=now,
        )

    def identify(command: Command, now: float) -> Execution:
        log.warning("IDENTIFY: this is device %s, asked for by command %s", config.device_id, command.command_id)
        program = config.commands.identify_program
        return Identifying(program, now) if program else Unidentified()

    shutil.rmtree(config.state_dir / FOLDER, ignore_errors=True)  # of an agent that was killed
    book = CommandBook(journal)
    starters: dict[CommandKind, Callable[[Command, float], Execution]] = {
        CommandKind.RESTART_RUNTIME: lambda _command, now: Restarting(inference, now),
        CommandKind.LOGS: lambda command, _now: Following(command.command_id, command.arguments, ring, say),
        CommandKind.BENCHMARK: benchmark,
        CommandKind.FACTS: lambda _command, _now: MeasuringFacts(measure, take_facts),
        CommandKind.IDENTIFY: identify,
    }
    return CommandDesk(book, config.commands.allowed, starters, say), book
