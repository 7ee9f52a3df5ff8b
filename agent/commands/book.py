"""Which commands this device has acted on, in the journal: written before anything is done, so that it is done once.

A command that was being carried out when the agent ended is not begun again: it has failed as `interrupted`.
"""

from __future__ import annotations

import logging

import msgspec

from agent.protocol.commands import CommandAnswer, CommandPhase
from agent.update.journal import Journal

log = logging.getLogger("agent.commands")
KEPT = 256  # far more than are open at a time; who comes again later has expired
INTERRUPTED = "interrupted"
_DETAIL = "the agent ended while it carried this out; it is not begun again: look, then send another"


class CommandBook:
    """Answers by the command's id, the oldest first.

    Args:
        journal: keeps them.

    Raises:
        DatabaseError: when the journal can't be read.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._answers: dict[str, CommandAnswer] = {}
        self._unsaved: set[str] = set()
        for key, row in journal.commands().items():
            try:
                self._answers[key] = msgspec.json.decode(row, type=CommandAnswer)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("command %s in the journal can't be read: %s", key, error)
                self._answers[key] = CommandAnswer(key, CommandPhase.FAILED, INTERRUPTED, _DETAIL)
        for key, answer in self._answers.items():
            if answer.phase is CommandPhase.RUNNING:
                self._answers[key] = CommandAnswer(key, CommandPhase.FAILED, INTERRUPTED, _DETAIL)
                self._unsaved.add(key)

    @property
    def lasts(self) -> bool:
        """Whether what is written now is known after a restart."""
        return not self._journal.unwritable

    def answer(self, command_id: str) -> CommandAnswer | None:
        """What was last said of a command; None for one that is new."""
        return self._answers.get(command_id)

    def note(self, answer: CommandAnswer) -> None:
        """A command has come so far; of the oldest nothing is known any more.

        Raises:
            DatabaseError: when it can't be written; it is known until the agent ends.
        """
        self._answers[answer.command_id] = answer
        self._unsaved.add(answer.command_id)
        self.keep()

    def keep(self) -> None:
        """Write what is not written yet.

        Raises:
            DatabaseError: when it can't be.
        """
        gone = list(self._answers)[:-KEPT]
        for key in gone:
            del self._answers[key]
        self._unsaved.difference_update(gone)
        if gone:
            self._journal.forget_commands(gone)
        if self._unsaved:
            self._journal.save_commands({key: msgspec.json.encode(self._answers[key]) for key in self._unsaved})
            self._unsaved.clear()

    def keep_all(self) -> None:
        """Write every one again: the journal was lost."""
        self._unsaved.update(self._answers)
