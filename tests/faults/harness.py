"""Kills a device at every dealing with its disk, starts it again, and looks whether it does what it must.

It forks: the parent has imported everything and has one thread, so a device starts in milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.faults import device
from tests.faults.disk import Disk, Plan


@dataclass
class Outcome:
    """What came of some points: how many were tried, how many lived through, and what was wrong with the others."""

    tried: int = 0
    recovered: int = 0
    lost: list[str] = field(default_factory=list)


def forked(work: Callable[[], object], log: Path) -> int:
    """Do something in a child; its exit status, negative when a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            logging.disable(logging.CRITICAL)
            work()
            os._exit(0)
        except BaseException:
            with log.open("a") as file:
                file.write(json.dumps({"violation": traceback.format_exc()[-1500:]}) + "\n")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def points_of(work: Callable[[Path, Path, Callable[[], None]], object]) -> list[str]:
    """The points of an undisturbed run, in order."""
    with tempfile.TemporaryDirectory(prefix="shoal-faults-") as name:
        home = Path(name)
        state = home / "state"
        state.mkdir()

        def listed() -> None:
            disk = Disk(state)
            work(state, home / "log", disk.install)
            with os.fdopen(os.open(home / "points", os.O_WRONLY | os.O_CREAT), "w") as file:
                json.dump(disk.points, file)

        status = forked(listed, home / "log")
        assert status == 0, (home / "log").read_text()
        assert "violation" not in (home / "log").read_text(), (home / "log").read_text()
        points: list[str] = json.loads((home / "points").read_text())
        return points


def survives(plans: Iterable[Plan], **options: Any) -> str | None:
    """Run a device through some ends, one after another, and then undisturbed; what was wrong, if anything was.

    Args:
        plans: of the ends.
        options: of `device.run`, for every start.
    """
    with Home() as home:
        for plan in plans:
            home.run(plan, **options)
        home.run(**options)
        return home.verdict()


class Home:
    """A device's folder, what was seen of it, and how often its machine was started."""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-faults-"))
        self.state, self.log = self._folder / "state", self._folder / "log"
        self.state.mkdir()
        self.boot = 1
        self._wrong: list[str] = []
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, plan: Plan | None = None, **options: Any) -> None:
        """Run the device until the script is done, or the plan ends it."""
        before = Disk(self.state, plan).install if plan else lambda: None
        status = forked(lambda: device.run(self.state, self.log, boot=self.boot, before=before, **options), self.log)
        if status != 0 and not (plan and status == -signal.SIGKILL):
            self._wrong.append(f"the agent ended with {status}")
        self.boot += plan is not None and plan.how == "power"

    def seen(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def verdict(self) -> str | None:
        """What was wrong, if anything was."""
        wrong = [*self._wrong, *(one["violation"] for one in self.seen() if "violation" in one)]
        if not wrong and not any("finished" in one for one in self.seen()):
            wrong = ["it did not end on the right version"]
        return "; ".join(wrong[:3]) or None
