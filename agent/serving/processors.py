"""Which processors threads run on, and how urgently: a thread passes both on to those that it starts."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger("agent.worker")
NICE = 19
TASKS = Path("/proc/self/task")


def pin(cores: Iterable[int]) -> None:
    """Let the calling thread, and those that it starts from now on, run on these processors only; none: on all.

    Those that the machine does not have, or the process may not use, are left out; where nothing is left, all stay.
    """
    wanted = set(cores)
    if not wanted or not hasattr(os, "sched_setaffinity"):
        return
    there = wanted & os.sched_getaffinity(os.getpid())
    if not there:
        log.warning("none of the processors %s can be used here: it may run on all", sorted(wanted))
        return
    os.sched_setaffinity(threading.get_native_id(), there)


@contextlib.contextmanager
def yielding(*, starts_threads: bool) -> Iterator[None]:
    """Let the calling thread yield to others, for good, but none of the threads that it starts meanwhile.

    Those are a runtime's, which answer requests later. Where the system does not let them be made as urgent as the rest
    again (that takes a privilege), the calling thread does not yield either.
    """
    usual = os.getpriority(os.PRIO_PROCESS, os.getpid()) if hasattr(os, "getpriority") else 0
    if not hasattr(os, "setpriority") or (starts_threads and not _may_return(usual)):
        yield
        return
    before = _threads()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    try:
        yield
    finally:
        for thread in _threads() - before:
            with contextlib.suppress(OSError):  # one may have ended
                os.setpriority(os.PRIO_PROCESS, thread, usual)


def _threads() -> set[int]:
    try:
        return {int(one.name) for one in TASKS.iterdir()}
    except OSError:
        return set()


def _may_return(usual: int) -> bool:
    """Whether a thread that yielded may be as urgent as before: tried with one that does nothing else."""
    allowed: list[bool] = []

    def try_it() -> None:
        own = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, own, NICE)
            os.setpriority(os.PRIO_PROCESS, own, usual)
        except OSError:
            allowed.append(False)
        else:
            allowed.append(True)

    thread = threading.Thread(target=try_it, name="priority", daemon=True)
    thread.start()
    thread.join()
    return allowed == [True]
