"""A version of the agent on trial: counts its starts, watches it, and takes it back. Part of `agent.launcher`.

Standard library only; no release replaces it. What it writes is read by the agent (`agent.releases.folder`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from typing import Any, NoReturn

from agent.launcher import SOCKETS, WATCHER, become, become_usable, pointer, runs, say
from agent.sd_notify import ServiceManager

RESTORED = ("journal.db", "journal.db-wal", "serving.json")  # what a version that is taken back must not have changed
FAILURES = 8  # that are kept
PAUSE_S = 0.5  # before a version that ended is started again; twice as long each time
LOOK_S = 0.2  # between looks whether it has proved itself
LOOK = signal.SIGURG  # to the launcher: its child is about to become another version. Nobody dies of it
ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class Trials:
    """What a launcher does while a version is on trial.

    Args:
        folder: of the releases.
        arguments: of the command line.
    """

    def __init__(self, folder: str, arguments: list[str]) -> None:
        self._folder = folder
        self._arguments = arguments
        self._next = ""
        self._trial: dict[str, Any] = {}

    def run(self) -> None:
        """Try what is to be tried; become what has proved itself where it is not started (again)."""
        watched = os.environ.pop(WATCHER, "") == str(os.getppid())
        if not self._begin_trial():
            become_usable(self._folder, self._arguments)
        elif watched:
            os.environ[WATCHER] = str(os.getppid())
            os.kill(os.getppid(), LOOK)  # it looks after the trial from now on
            self._become(self._next)
        else:
            self._watch()

    # -- the trial's files

    def _begin_trial(self) -> bool:
        """Whether a version is to be tried now; its start is counted by then, and what it may change is copied."""
        which = pointer(self._folder, "next")
        if which is None:
            return False
        self._next = which
        try:
            self._trial = self._read("trial.json")
        except (OSError, ValueError):
            self._trial = {}
        problem = self._problem(which)
        try:
            if not problem and not self._trial["starts"]:
                self._copy()
            if not problem:
                _unlink(self._path("waits"))
                self._trial["starts"] += 1
                self._write("trial.json", self._trial)
        except OSError as error:
            problem = f"{self._folder} can't be written: {error.strerror}"
        if problem:
            self._take_back(problem)
        return not problem

    def _problem(self, which: str) -> str:
        """Why a version is not started (again); empty when it is."""
        if self._trial.get("release") != which or "starts" not in self._trial:
            return "what was to be tried, and how, can't be read"
        if self._trial.get("deployment_id") in self._failures():
            return "its trial had ended already"
        if self._trial["starts"] >= self._trial["most_starts"]:
            return self._trial.get("last") or f"it was started {self._trial['starts']} times and did not prove itself"
        return "" if runs(self._folder, which) else "it is not there to be started, or not whole"

    def _failures(self) -> dict[str, Any]:
        try:
            found = self._read("failed.json")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _copy(self) -> None:
        """Keep the journal as it is: what a newer agent makes of it, an older one need not be able to read."""
        kept, state = self._path("before"), os.path.dirname(self._folder)
        shutil.rmtree(kept, ignore_errors=True)
        os.makedirs(kept, exist_ok=True)
        for name in RESTORED:
            _unlink(os.path.join(kept, name))
            _copy_file(os.path.join(state, name), os.path.join(kept, name))
        _sync_folder(kept)
        _sync_folder(self._folder)  # the start is counted after this: until then it is copied again

    def _take_back(self, reason: str) -> None:
        """End a trial: first its reason is written down, at last its pointer goes; in between all may be done again."""
        say(f"the agent's release {self._trial.get('version') or self._next} is taken back: {reason}")
        failures = self._failures()
        key = str(self._trial.get("deployment_id"))
        if key not in failures:
            starts = self._trial.get("starts", 0)
            failures[key] = {"release": self._next, "reason": reason, "starts": starts, "at": time.time()}
            try:
                self._write("failed.json", dict(list(failures.items())[-FAILURES:]))
            except OSError as error:
                say(f"that can't be written down: {error}")
        if self._trial.get("starts"):
            self._restore()
        for name in ("next", "trial.json", "waits"):
            try:
                _unlink(self._path(name))
                _sync_folder(self._folder)
            except OSError as error:
                say(f"{name} can't be removed: {error}")
        shutil.rmtree(self._path("before"), ignore_errors=True)

    def _restore(self) -> None:
        kept, state = self._path("before"), os.path.dirname(self._folder)
        if not os.path.isdir(kept):
            return
        try:
            for name in (*RESTORED, "journal.db-shm"):
                if not os.path.exists(os.path.join(kept, name)):
                    _unlink(os.path.join(state, name))
            for name in reversed(RESTORED):  # the journal last: beside its own log it is whole
                if os.path.exists(os.path.join(kept, name)):
                    part = os.path.join(state, f".{name}.before")
                    _copy_file(os.path.join(kept, name), part)
                    os.rename(part, os.path.join(state, name))
            _sync_folder(state)
        except OSError as error:
            say(f"the journal can't be brought back: {error}")

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _read(self, name: str) -> Any:
        with open(self._path(name)) as file:
            return json.load(file)

    def _write(self, name: str, content: Any) -> None:
        part = self._path(f".{name}.launcher")
        with open(part, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, self._path(name))
        _sync_folder(self._folder)

    # -- the watch

    def _watch(self) -> NoReturn:
        """Try the version as a child of this process, until it has proved itself or is taken back; then stand aside."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _Watched.HEARD)
        while True:
            watched = _Watched(self, self._start(before))
            status = watched.ended()
            if status is not None and (watched.asked or not self._goes_on(status)):
                _end_like(status, before)
            if pointer(self._folder, "next") != self._next:  # taken back, or replaced: this process is the agent again
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _goes_on(self, status: int) -> bool:
        """Whether a version that ended by itself is started again, or another in its place."""
        if pointer(self._folder, "next") != self._next:
            return False  # it had proved itself: what is to become of it, others decide
        self._trial["last"] = f"it {_told(status)} {self._trial['starts']} times"
        with contextlib.suppress(OSError):
            self._write("trial.json", self._trial)
        time.sleep(PAUSE_S * 2 ** (self._trial["starts"] - 1))
        self._begin_trial()
        return True

    def expired(self) -> None:
        """The version that is tried has not proved itself in time."""
        self._take_back(f"it did not prove itself within {self._trial['confirm_s']:g} s: {self._missing()}")

    def _missing(self) -> str:
        """What the version itself says that it waits for."""
        try:
            with open(self._path("waits")) as file:
                return file.read(500)
        except OSError:
            return "it says nothing"

    @property
    def proved(self) -> bool:
        """Whether the version that is tried has proved itself."""
        return pointer(self._folder, "next") != self._next and pointer(self._folder, "current") == self._next

    @property
    def within_s(self) -> float:
        """How long it may take for that, in seconds."""
        return float(self._trial["confirm_s"])

    def look_again(self) -> bool:
        """Whether the child has become another version, which is on trial."""
        which = pointer(self._folder, "next")
        if which is None or which == self._next:
            return False
        try:
            self._trial = self._read("trial.json")
        except (OSError, ValueError):
            return False
        self._next = which
        return True

    def _start(self, mask: set[int | signal.Signals]) -> int:
        """The process of the version that is tried."""
        parent, child = os.getpid(), os.fork()
        if child:
            return child
        status = 1
        try:
            _end_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ[WATCHER] = str(parent)
            if "WATCHDOG_PID" in os.environ:
                os.environ["WATCHDOG_PID"] = str(os.getpid())
            self._become(self._next)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            os._exit(status)

    def _become(self, which: str) -> None:
        try:
            become(which, self._folder, self._arguments)
        except (OSError, ValueError, KeyError) as error:
            say(f"{which} can't be started: {error}")
            sys.exit(1)


class _Watched:
    """A child on trial, and after it: waits for its end.

    Args:
        trials: knows the trial.
        child: the process.

    Attributes:
        asked: whether somebody wanted the agent to end.
    """

    HEARD = frozenset({signal.SIGCHLD, LOOK, signal.SIGUSR2, *ENDING})

    def __init__(self, trials: Trials, child: int) -> None:
        self._trials, self._child = trials, child
        self._until: float | None = time.monotonic() + trials.within_s
        self._manager = ServiceManager(os.environ)
        self.asked = False

    def ended(self) -> int | None:
        """How the child ended by itself, or because it was asked to; None where it was ended for want of a proof."""
        while True:
            left = None if self._until is None else self._until - time.monotonic()
            if left is not None and left <= 0:
                self._kill()
                if self._trials.proved:  # in the last moment: it is started again
                    return None
                self._trials.expired()
                return None
            if left is not None:
                # A trial may be longer than systemd waits for a sign of life, and a bad version gives none.
                self._manager.alive()
            self._hear(None if left is None else min(left, LOOK_S))
            status = self._reap()
            if status is not None:
                return status
            if self._until is not None and self._trials.proved:
                self._until = None
                _close_worker()

    def _hear(self, wait_s: float | None) -> None:
        if wait_s is None:
            number = signal.sigwait(self.HEARD)
        else:
            found = signal.sigtimedwait(self.HEARD, wait_s)
            number = signal.Signals(found.si_signo) if found is not None else signal.SIGCHLD
        if number not in {signal.SIGCHLD, LOOK}:
            self.asked = self.asked or number in ENDING
            os.kill(self._child, number)
        elif number == LOOK and self._trials.look_again():
            self._until = time.monotonic() + self._trials.within_s

    def _reap(self) -> int | None:
        """The status of the child, where it has ended; others that ended here are nobody else's."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1
            if pid == 0:
                return None
            if pid == self._child:
                return os.waitstatus_to_exitcode(status)

    def _kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


def _told(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with {status}"


def _end_like(status: int, mask: set[int | signal.Signals]) -> NoReturn:
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.kill(os.getpid(), -status)
        status = 128 - status  # the first process of a container is not ended by that
    sys.exit(status)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the one that watches it does."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def _close_worker() -> None:
    """The worker of the version before is of no use any more; the sockets that listen stay."""
    try:
        told = json.loads(os.environ.get(SOCKETS, "{}"))
        descriptor = told.pop("worker", None)
        os.environ[SOCKETS] = json.dumps(told)
        if descriptor is not None:
            os.close(descriptor)
    except (OSError, ValueError):
        return


def _copy_file(source: str, target: str) -> None:
    """Copy a file that may be there, and sync it."""
    if not os.path.exists(source):
        return
    with open(source, "rb") as read, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as write:
        shutil.copyfileobj(read, write)
        write.flush()
        os.fsync(write.fileno())


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
