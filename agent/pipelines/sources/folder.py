"""Files that appear in a folder: each is taken once, when it is whole, also over restarts.

A file is whole when its size and time stayed as they were from one look to the next, or have for a while. Which ones
are done with is kept with their results, so a kill in between changes nothing. One that is refused stays where it is.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.pipelines.config import FolderSource
from agent.pipelines.content import content_type, identity, refusal
from agent.pipelines.items import Answer, Item, Progress, SourceError
from agent.serving.exchange import BODY_LIMIT

LOOK_S = 0.5
SETTLED_S = 2.0
WHOLE_LOOK_S = 5.0  # a folder whose own time stayed is looked through no more often
UNFINISHED = (".part", ".partial", ".tmp", ".filepart", ".crdownload")
DONE, REFUSED = "done", "refused"


@dataclass(frozen=True)
class _Look:
    """A file as it was seen."""

    size: int
    changed_ns: int
    identity: str


class Folder:
    """The source.

    Args:
        config: of it.
        progress: what is done with, by name: its identity and how it ended.
        forget: of names that are gone.
    """

    live = False

    def __init__(
        self, config: FolderSource, progress: Mapping[str, str], forget: Callable[[Sequence[str]], None]
    ) -> None:
        self._config = config
        self._folder = Path(config.path)
        self._progress = dict(progress)
        self._forget = forget
        self._seen: dict[str, _Look] = {}
        self._ready: list[tuple[str, _Look]] = []
        self._look_at = 0.0
        self._whole_at = 0.0
        self._folder_ns = 0

    def next(self, wait_s: float) -> Item | None:
        """The next whole file."""
        until = time.monotonic() + wait_s
        while True:
            while self._ready:
                name, look = self._ready.pop(0)
                item = self._take(name, look)
                if item is not None:
                    return item
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + LOOK_S
                self._look(now)
            elif now >= until:
                return None
            else:
                time.sleep(min(until, self._look_at) - now)

    def settled(self, item: Item, answer: Answer | None) -> None:
        """It is kept that a file is done with: now it may go."""
        kept = item.progress if answer is not None else item.refused_progress
        assert kept is not None
        self._progress[kept.key] = kept.state
        if answer is not None:
            self._then(kept.key)

    def close(self) -> None:
        """Look at everything again."""
        self._ready.clear()
        self._folder_ns = 0

    def _look(self, now: float) -> None:
        """Find files that are whole and not done with."""
        try:
            folder_ns = self._folder.stat().st_mtime_ns
            if folder_ns == self._folder_ns and not self._seen and now < self._whole_at:
                return
            found = {entry.name: _look(entry) for entry in os.scandir(self._folder)}
        except OSError as error:
            raise SourceError(
                f"the folder {self._folder} can't be read: {error.strerror}; make it, or name another"
            ) from None
        self._folder_ns, self._whole_at = folder_ns, now + WHOLE_LOOK_S
        files = {name: look for name, look in found.items() if look is not None and _is_meant(name)}
        gone = [name for name in self._progress if name not in found]
        if gone:
            self._forget(gone)
            for name in gone:
                del self._progress[name]
        fresh = {name: look for name, look in files.items() if not self._is_done(name, look)}
        before, self._seen = self._seen, {}
        ready = []
        for name, look in fresh.items():
            if before.get(name) == look or 0 <= look.changed_ns <= time.time_ns() - SETTLED_S * 1e9:
                ready.append((name, look))
            else:
                self._seen[name] = look
        by_time = self._config.order == "time"
        self._ready = sorted(ready, key=lambda pair: (pair[1].changed_ns if by_time else 0, pair[0]))

    def _is_done(self, name: str, look: _Look) -> bool:
        known, _, how = self._progress.get(name, "").partition(" ")
        if known != look.identity:
            return False
        if how == DONE:
            self._then(name)  # for one that was killed, or could not, when it was done
        return True

    def _take(self, name: str, look: _Look) -> Item | None:
        """Read a file; None where it is another by now."""
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                if _as_look(os.fstat(descriptor)) != look:
                    return None
                body = file.read(BODY_LIMIT + 1)
                if _as_look(os.fstat(descriptor)) != look:
                    return None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"{self._folder / name} can't be read: {error.strerror}") from None
        return Item(
            body=body,
            content_type=content_type(body),
            about={"file": name, "size": look.size, "modified_at": look.changed_ns / 1e9},
            name=f"{name}\n{look.identity}",
            taken_at=time.time(),
            progress=Progress(name, f"{look.identity} {DONE}"),
            refused_progress=Progress(name, f"{look.identity} {REFUSED}"),
            refusal=refusal(body),
        )

    def _then(self, name: str) -> None:
        path = self._folder / name
        try:
            if self._config.then == "delete":
                path.unlink(missing_ok=True)
            elif self._config.then == "move":
                path.rename(_free(Path(self._config.move_to), name))
        except FileNotFoundError as error:
            if path.exists():
                raise SourceError(f"{path} can't be moved: {error.strerror}; make the folder of `then`") from None
        except OSError as error:
            verb = "moved" if self._config.then == "move" else "deleted"
            raise SourceError(
                f"{path} can't be {verb}: {error.strerror}; a folder for `move:` has to be of the same file system"
            ) from None


def _look(entry: os.DirEntry[str]) -> _Look | None:
    """None for what is no plain file, or is gone."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    return _as_look(found) if stat.S_ISREG(found.st_mode) else None


def _as_look(found: os.stat_result) -> _Look:
    return _Look(found.st_size, found.st_mtime_ns, identity(found))


def _is_meant(name: str) -> bool:
    """Hidden files and those that a program says are unfinished are not; nor are names that no JSON can hold."""
    hidden = name.startswith(".") or name.lower().endswith(UNFINISHED)
    return not hidden and name.isprintable()


def _free(folder: Path, name: str) -> Path:
    """A path in a folder that is not taken."""
    target, number = folder / name, 1
    while target.exists():
        target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    return target
