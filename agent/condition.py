"""How the device itself is: notes what goes wrong with its files, worker, clock and link, and mends files where it can.

Called by the supervisor's main loop only. It knows nothing of deployments.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

from agent.database import DatabaseError
from agent.files import STORAGE_ERRORS, storage_code
from agent.problems import (
    CLOCK_SET,
    ENSEMBLE_UNSERVABLE,
    GRPC_NOT_SERVED,
    JOURNAL_LOST,
    OFFLINE,
    SPOOL_LOST,
    STAND_IN,
    TELEMETRY_DROPPED,
    WORKER_ENDED,
    WORKER_HUNG,
    WORKER_NOT_STARTED,
    ClockWatch,
    Problems,
)
from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import Problem
from agent.telemetry.spool import Spool
from agent.update.journal import Journal

log = logging.getLogger("agent")
RENEW_S = 30.0
OFFLINE_S = 3600.0


class Condition:
    """The device's own problems.

    Args:
        journal: keeps them; is mended.
        spool: is mended.
        lost: what else was found damaged at the start; empty when nothing was.
        place: the folder of all files, as people are told of it.
    """

    def __init__(self, journal: Journal, spool: Spool, lost: str, place: str) -> None:
        self._place = place
        self._journal = journal
        self._spool = spool
        self._problems = Problems(journal.note("problems"))
        self._clock = ClockWatch(time.time(), time.monotonic())
        self._renew_at: float | None = None
        self._down_since = time.monotonic()
        self._dropped = 0
        for code, detail in ((JOURNAL_LOST, journal.lost), (SPOOL_LOST, spool.lost), (JOURNAL_LOST, lost)):
            if detail:
                self._note(code, detail, subject=detail[:80])
        for why in (journal.unwritable, spool.unwritable):
            if why:
                self.storage(WireErrorCode.STORE_ERROR, why)

    def reports(self) -> tuple[Problem, ...]:
        """What the server is told."""
        return self._problems.reports()

    @property
    def changed(self) -> bool:
        """Whether there is something new to be reported and kept."""
        return self._problems.changed

    def keep(self) -> None:
        """Write down what is new.

        Raises:
            DatabaseError: when it can't be written; it is known until the agent ends.
        """
        self._problems.changed = False
        self._journal.keep_note("problems", self._problems.packed())

    def guard(self, step: Callable[[], None]) -> None:
        """Do something that may fail: it fails alone, and what serves goes on."""
        try:
            step()
        except DatabaseError as error:
            self.storage(error.code, error.detail)
        except Exception as error:
            log.exception("an event could not be handled; the agent goes on")
            if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                self.storage(storage_code(error), f"{self._place}: {error.strerror}")

    # -- files

    def storage(self, code: WireErrorCode, detail: str) -> None:
        """The disk could not be written."""
        log.error("%s: %s", code.value, detail)
        self._note(code.value, detail, ongoing=True)
        if self._renew_at is None:
            self._renew_at = time.monotonic() + RENEW_S

    def journal_failed(self, error: DatabaseError) -> bool:
        """The journal could not be written; whether it is empty now, and all is to be written again."""
        self.storage(error.code, error.detail)
        if not error.damaged or self._journal.renew():
            return False
        self._note(JOURNAL_LOST, f"{self._journal.lost}; it was written anew", subject="running")
        return True

    def mend(self, now: float) -> None:
        """Where files stand in memory, try to have them on the disk again; an end of a problem is one too."""
        if self._renew_at is None or now < self._renew_at:
            return
        self._renew_at = now + RENEW_S
        if self._journal.unwritable:
            self._journal.renew()
        if self._spool.unwritable:
            self._spool.renew()
        if not (self._journal.unwritable or self._spool.unwritable):
            self._renew_at = None
            for code in (WireErrorCode.DISK_FULL, WireErrorCode.STORE_ERROR):
                self._problems.over(code.value)

    def count_dropped(self) -> None:
        """Say how much telemetry was dropped since the last time."""
        count = self._spool.dropped - self._dropped
        if count:
            self._dropped = self._spool.dropped
            detail = "telemetry was dropped, the oldest first: the server took none for long, or the disk is full"
            self._note(TELEMETRY_DROPPED, detail, count=count)

    # -- worker

    def worker_ended(self, status: int | None) -> None:
        """The worker died."""
        how = f"ended with {status}"
        if status is not None and status < 0:
            short = " (the kernel does that when memory is short)" if status == -signal.SIGKILL else ""
            how = f"was ended by signal {-status}{short}"
        self._note(WORKER_ENDED, f"the inference worker {how}; it is started again", subject=str(status))

    def worker_hung(self, why: str) -> None:
        """The worker did not go on, and was ended."""
        detail = f"the inference worker hung, because {why}; it was ended and is started again (hang_s)"
        log.error(detail)
        self._note(WORKER_HUNG, detail)

    def worker_started(self, error: OSError | None) -> None:
        """The worker was started, or could not be."""
        if error is None:
            self._problems.over(WORKER_NOT_STARTED)
            return
        detail = f"the inference worker can't be started: {error.strerror}; free memory or processes"
        log.error(detail)
        self._note(WORKER_NOT_STARTED, detail, ongoing=True)

    def grpc_served(self, address: str, problem: str) -> None:
        """The worker serves gRPC at an address, or says why it can't."""
        if not problem:
            log.info("the local inference API is at %s by gRPC too", address)
            self._problems.over(GRPC_NOT_SERVED)
            return
        log.error(problem)
        self._note(GRPC_NOT_SERVED, problem, ongoing=True)

    def stands_in(self, model: str, version: str) -> None:
        """An earlier version serves in the place of what ought to."""
        detail = f"{model}: what ought to serve can't yet; {version}, which served before, does"
        log.warning(detail)
        self._note(STAND_IN, detail, subject=model)

    def ensemble(self, name: str, why: str | None) -> None:
        """What keeps an ensemble from being served; None when nothing does any more."""
        if why is None:
            self._problems.over(ENSEMBLE_UNSERVABLE, subject=name)
            return
        detail = f"ensemble {name}: {why}"
        log.warning(detail)
        self._problems.note(ENSEMBLE_UNSERVABLE, detail, time.time(), subject=name, ongoing=True, retold=True)

    # -- pipelines

    def pipeline(self, code: str, subject: str, detail: str, *, count: int = 1, ongoing: bool) -> None:
        """A pipeline does not go on, or something went wrong there; it has logged that itself."""
        self._problems.note(code, detail, time.time(), subject=subject, count=count, ongoing=ongoing, retold=True)

    def pipeline_over(self, code: str, subject: str) -> None:
        """What was ongoing there is no more."""
        self._problems.over(code, subject=subject)

    # -- clock and link

    def link_up(self) -> None:
        """The broker is back."""
        away = time.monotonic() - self._down_since
        if away >= OFFLINE_S:
            self._note(OFFLINE, f"there was no broker for {away / 3600:.1f} hours")

    def watch(self, *, connected: bool) -> None:
        """Notice when the link goes, and when somebody sets the clock."""
        now, wall = time.monotonic(), time.time()
        if connected:
            self._down_since = now
        moved = self._clock.tick(wall, now)
        if moved:
            log.warning("the clock was set by %+.0f s", moved)
            self._note(CLOCK_SET, f"the clock was set by {moved:+.0f} s")

    def _note(self, code: str, detail: str, *, subject: str = "", count: int = 1, ongoing: bool = False) -> None:
        self._problems.note(code, detail, time.time(), subject=subject, count=count, ongoing=ongoing)
