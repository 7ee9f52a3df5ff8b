"""A device's launcher without its agents: what each version does is a few lines here, and every point may be the last.

It forks (`tests.faults.harness`): a start of the machine takes milliseconds. What is real is the folder, its pointers,
the counting, the copy of the journal and its restoring; what is made up is what a version does when it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

from agent.launcher import INSTALLED, pointer, usable
from agent.release_trial import Trials
from agent.releases.folder import ReleaseFolder, Trial
from agent.update.journal import Journal
from tests.faults.disk import Disk, Plan
from tests.faults.harness import forked

NEW = "f" * 64
STARTS = 2
MOST_RUNS = 12


class Machine:
    """The state folder of a device whose agent is to become another release, which is good or bad."""

    def __init__(self, *, good: bool) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="shoal-launcher-"))
        self.state, self.log = self.home / "state", self.home / "log"
        self.good = good
        release = self.state / "agent" / "releases" / NEW
        (release / "site").mkdir(parents=True)
        (release / "release.json").write_text("{}")
        journal = Journal(self.state / "journal.db")
        journal.keep_note("who", b"old")
        journal.close()
        (self.state / "serving.json").write_text('"old"')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def power_on(self, plan: Plan | None = None) -> None:
        """Start the machine, and let it run until nothing more happens, or to the end that is planned."""
        disk = Disk(self.state, plan)
        forked(lambda: self._runs(disk), self.log)

    def points(self) -> list[str]:
        """Those of a run that nothing ends."""
        target = self.home / "points"

        def work() -> None:
            disk = Disk(self.state)
            self._runs(disk)
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT), "w") as file:
                json.dump(disk.points, file)

        status = forked(work, self.log)
        assert status == 0, self.log.read_text()
        found: list[str] = json.loads(target.read_text())
        return found

    def _runs(self, disk: Disk) -> None:
        """Agents one after the other, as a service manager starts them."""
        disk.install()
        for _ in range(MOST_RUNS):
            if not self._run():
                return
        raise AssertionError("it never comes to rest")

    def _run(self) -> bool:
        """Launcher and agent once; whether it goes on."""
        folder = str(self.state / "agent")
        which = self._launch(folder)
        self._note(which)
        if which != INSTALLED:
            return self._new(folder, on_trial=pointer(folder, "next") is not None)
        return self._old(folder)

    def _launch(self, folder: str) -> str:
        if pointer(folder, "next") is None:
            return usable(folder)
        trials = Trials(folder, [])
        return trials._next if trials._begin_trial() else usable(folder)

    def _old(self, folder: str) -> bool:
        """The installed version: it must find its journal as it was, and wants the new one, once."""
        journal = Journal(self.state / "journal.db")
        assert not journal.lost, journal.lost
        assert journal.note("who") == b"old"
        assert json.loads((self.state / "serving.json").read_text()) == "old"
        tried = ReleaseFolder(self.state / "agent").failed("d-1") is not None
        journal.close()
        if tried:
            return False
        trial = Trial("d-1", f"releases/{NEW}", "2", confirm_s=5, most_starts=STARTS)
        ReleaseFolder(self.state / "agent").set_next(trial, "1")
        return True

    def _new(self, folder: str, *, on_trial: bool) -> bool:
        """The new version: a good one proves itself, a bad one spoils the journal and ends."""
        running = ReleaseFolder(Path(folder), f"{folder}/releases/{NEW}")
        if not on_trial:
            return False
        trial = running.trial
        assert trial is not None
        assert trial.starts <= STARTS
        if self.good:
            running.confirm()
            return False
        journal = Journal(self.state / "journal.db")
        journal.keep_note("who", b"new")
        journal.close()
        (self.state / "serving.json").write_text("{")
        return True

    def _note(self, which: str) -> None:
        descriptor = os.open(self.home / "starts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{which}\n".encode())
        os.close(descriptor)

    def verdict(self) -> str | None:
        """What is wrong after all has come to rest; None when nothing is."""
        text = self.log.read_text() if self.log.exists() else ""
        if "violation" in text:
            return text
        starts = (self.home / "starts").read_text().splitlines()
        wanted = f"releases/{NEW}" if self.good else INSTALLED
        if starts[-1] != wanted:
            return f"{starts[-1]} runs at the end, and not {wanted}: {starts}"
        if not self.good and (failed := ReleaseFolder(self.state / "agent").failed("d-1")) is None:
            return f"nothing says that the new version failed: {failed}"
        tried = starts.count(f"releases/{NEW}")
        return f"it was started {tried} times" if not self.good and tried > STARTS else None


def lost(good: bool, chosen: Callable[[list[str]], list[int]], ends: tuple[str, ...]) -> tuple[int, list[str]]:
    """End a machine at points of such a run, and look what came of each: how many were tried, and what was wrong."""
    with Machine(good=good) as machine:
        try:
            points = machine.points()
        except AssertionError as error:  # it is wrong though nothing ended it
            return 0, [str(error)]
    wrong, tried = [], 0
    for point in chosen(points):
        for side in ("before", "after"):
            for how in ends:
                with Machine(good=good) as machine:
                    machine.power_on(Plan(point, side, how, seed=point))
                    machine.power_on()
                    tried += 1
                    if (problem := machine.verdict()) is not None:
                        wrong.append(f"{how} {side} point {point} ({points[point]}): {problem}")
    return tried, wrong


def main() -> int:
    """Every point, or every so many, of good and bad releases; killed and without power."""
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    tried, wrong = 0, []
    for good in (True, False):
        count, found = lost(good, lambda points: list(range(0, len(points), every)), ("kill", "power"))
        tried, wrong = tried + count, wrong + found
    print("\n".join(wrong[:20]), file=sys.stderr)
    print(json.dumps({"tried": tried, "lost": len(wrong)}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
