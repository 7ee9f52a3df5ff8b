"""What every sink promises, and the thread that sends what waits for it: in order, until it is taken."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from agent.database import DatabaseError
from agent.pipelines.health import Health
from agent.pipelines.outbox import Kept, Outbox
from agent.problems import PIPELINE_DROPPED, PIPELINE_UNDELIVERED
from agent.protocol.secrets import hide_secrets

log = logging.getLogger("agent.pipelines")
LONGEST_PAUSE_S = 60.0
TRIES = 5  # of one event that a sink says is unusable
WAIT_S = 1.0


class SinkError(Exception):
    """A sink did not take what it was given; the message says why.

    Attributes:
        after_s: it is not to be tried earlier.
        unusable: it is about what was sent, not about the sink.
    """

    def __init__(self, message: str, *, after_s: float = 0.0, unusable: bool = False) -> None:
        super().__init__(hide_secrets(message))
        self.after_s = after_s
        self.unusable = unusable


class Sink(Protocol):
    """Takes results; all calls come from one thread."""

    batch: int

    def send(self, events: Sequence[Kept]) -> None:
        """Send results; when this returns, they are taken.

        Raises:
            SinkError: when they are not, or not all.
        """

    def close(self) -> None:
        """Let go of everything."""


class Sender:
    """The thread of one sink.

    Args:
        name: of the sink.
        sink: takes the results.
        outbox: has them.
        health: is told how it goes.
        retry_s: until it is tried again; each time twice as long.
    """

    def __init__(self, name: str, sink: Sink, outbox: Outbox, health: Health, retry_s: float) -> None:
        self._name, self._sink, self._outbox, self._health = name, sink, outbox, health
        self._stop = threading.Event()
        self._retry_s = self._pause_s = retry_s
        self._limit = sink.batch
        self._tries = 0
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except SinkError as error:
                self._failed(str(error), max(self._pause_s, error.after_s))
            except DatabaseError as error:
                self._failed(error.detail, self._pause_s)
            except Exception as error:
                log.exception("sink %s failed", self._name)
                self._failed(f"{type(error).__name__}: {error}", self._pause_s)
        self._sink.close()

    def _turn(self) -> None:
        events = self._outbox.due(self._name, self._limit, WAIT_S)
        if not events or self._stop.is_set():
            return
        try:
            self._sink.send(events)
        except SinkError as error:
            if not error.unusable:
                raise
            self._unusable(events, error)
            return
        self._outbox.confirm(self._name, [one.number for one in events])
        self._limit, self._tries, self._pause_s = self._sink.batch, 0, self._retry_s
        self._health.fine(PIPELINE_UNDELIVERED, self._name)

    def _unusable(self, events: Sequence[Kept], error: SinkError) -> None:
        """Find out which event it is, by sending one at a time; let go of that one after a few tries."""
        self._limit = 1
        if len(events) > 1:
            return
        self._tries += 1
        if self._tries < TRIES:
            raise error
        self._outbox.confirm(self._name, [events[0].number])
        self._tries, self._pause_s = 0, self._retry_s
        detail = f"{self._name} took no event {events[0].id} in {TRIES} tries, and it was dropped: {error}"
        self._health.trouble(PIPELINE_DROPPED, self._name, detail, ongoing=False)

    def _failed(self, why: str, pause_s: float) -> None:
        self._health.trouble(
            PIPELINE_UNDELIVERED, self._name, f"{self._name}: {hide_secrets(why)}; what waits is kept and sent again"
        )
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self._stop.wait(pause_s)
