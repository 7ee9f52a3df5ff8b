"""The newest log records of this agent and its inference worker, in memory and bounded: what `logs` answers from.

Every thread that logs adds to it. Texts hold no secrets, as on standard error, and no control characters but line ends
and tabs: they are shown on people's terminals.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from agent.protocol.commands import LEVELS, LogLine, plain
from agent.protocol.limits import LIMITS
from agent.protocol.secrets import hide_secrets

LINES = 2000
CHARS = 512 * 1024
TEXT_CHARS = 1000
Take = Callable[[float, str, str, str], None]


class LogRing:
    """Bounded by lines and by characters; the oldest go first."""

    def __init__(self) -> None:
        self._lines: deque[LogLine] = deque()
        self._chars = 0
        self._sequence = 0
        self._lock = threading.Lock()

    def add(self, at: float, level: str, source: str, logger: str, text: str) -> None:
        """Keep a record whose text holds no secrets."""
        known = level if level in LEVELS else "INFO"
        kept = plain(text)[:TEXT_CHARS]
        with self._lock:
            self._sequence += 1
            self._lines.append(LogLine(self._sequence, at, known, source, plain(logger)[: LIMITS.name_chars], kept))
            self._chars += len(kept)
            while len(self._lines) > LINES or self._chars > CHARS:
                self._chars -= len(self._lines.popleft().text)

    def newest(self, count: int, level: str) -> int:
        """Where the newest so many records of a level begin: what `after` takes to give these first."""
        with self._lock:
            if count == 0:
                return self._sequence
            fitting = [one.sequence for one in self._lines if _reaches(one, level)]
            return fitting[-count] - 1 if count <= len(fitting) else 0

    def after(self, sequence: int, level: str, most: int) -> tuple[list[LogLine], int, int]:
        """Records after one.

        Args:
            sequence: of that one; 0 for all there are.
            level: the least level.
            most: how many at most.

        Returns:
            The records; the sequence to go on after; and how many of any level are gone that came in between.
        """
        with self._lock:
            first = self._lines[0].sequence if self._lines else self._sequence + 1
            gone = max(0, first - sequence - 1) if sequence else 0
            found: list[LogLine] = []
            for line in self._lines:
                if line.sequence > sequence and _reaches(line, level):
                    found.append(line)
                    if len(found) == most:
                        return found, line.sequence, gone
            return found, self._sequence, gone


class RingHandler(logging.Handler):
    """Hands records on as time, level, logger and text.

    Args:
        take: takes them; called from the thread that logs, must not block or log.
    """

    def __init__(self, take: Take) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one on; one that can't be formatted is left to the other handlers to complain of."""
        try:
            text = hide_secrets(logging.Formatter().format(record))
        except Exception:  # noqa: BLE001 (whoever logged passed the wrong arguments)
            return
        self._take(record.created, record.levelname, record.name, text)


def _reaches(line: LogLine, level: str) -> bool:
    return LEVELS.index(line.level) >= LEVELS.index(level)
