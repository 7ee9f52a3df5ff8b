"""A disk whose power can be cut, and a process that can be killed at any of its dealings with it.

`Disk.install` replaces the functions by which Python writes files, in this process alone: the agent's code has no hook.
Each call below the watched folder is a point; the plan says at which one, and on which side of it, the process ends by
SIGKILL. With a power cut, the folder is first made what a machine would find after it: of the changes of names since a
folder was last synced some first ones count (file systems journal them in order), and of each file's content what was
synced last, what was written since, or a mixture of both. What is decided by chance comes from the plan's seed.

SQLite writes by itself: a commit is one point. What it had synced by then counts (`synchronous=FULL`: all of it), and
of its write-ahead log any part beyond.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 512


@dataclass(frozen=True)
class Plan:
    """Where the process ends: at which point, `before` or `after` it, by `kill` or `power`."""

    point: int
    side: str = "before"
    how: str = "kill"
    seed: int = 0


class Disk:
    """What is known of a folder's files: what a power cut would leave."""

    def __init__(self, folder: Path, plan: Plan | None = None) -> None:
        self.folder = str(folder)
        self.points: list[str] = []
        self._plan = plan
        self._real: dict[str, Any] = {}
        self._next_id = 0
        self._ids: dict[int, int] = {}  # of inodes: these are used again, ours are not
        self._synced: dict[int, bytes] = {}  # content that is safe
        self._ghosts: dict[int, bytes] = {}  # content of what has no name any more
        self._names: dict[str, int | str] = {}  # names that are safe: an id, or the target of a symbolic link
        self._changes: list[tuple[str, str, int | str]] = []  # of names, in order
        self._unsynced_logs: set[str] = set()  # of SQLite files without FULL

    # -- the patches

    def install(self) -> None:
        """Watch this process from now on."""
        for name in ("open", "fsync", "fdatasync", "replace", "rename", "unlink", "remove", "symlink", "pwrite"):
            self._real[name] = getattr(os, name)
        self._real["io.open"], self._real["connect"] = io.open, sqlite3.connect
        for path in self._files():
            self._know(path)
        os.open, io.open, builtins.open = self._open, self._io_open, self._io_open
        os.fsync = lambda fd: self._sync("fsync", fd)
        os.fdatasync = lambda fd: self._sync("fdatasync", fd)
        os.replace = os.rename = self._replace
        os.unlink = os.remove = self._unlink
        os.symlink = self._symlink
        os.pwrite = self._pwrite
        sqlite3.connect = self._connect

    def _point(self, kind: str, path: str, action: Callable[[], Any]) -> Any:
        number = len(self.points)
        self.points.append(f"{kind} {self._short(path)}")
        plan = self._plan
        if plan is not None and plan.point == number and plan.side == "before":
            self._die(plan)
        result = action()
        if plan is not None and plan.point == number and plan.side == "after":
            self._die(plan)
        return result

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        text = self._watched(path)
        if text is None or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return int(self._real["open"](path, flags, mode, **options))

        def action() -> int:
            known = os.path.exists(text)
            descriptor = self._real["open"](path, flags, mode, **options)
            if not known:
                self._made(text)
            return int(descriptor)

        return int(self._point("open", text, action))

    def _io_open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        text = self._watched(file) if not isinstance(file, int) else None
        if text is None or not set(mode) & set("wax+"):
            return self._real["io.open"](file, mode, *arguments, **options)

        def action() -> Any:
            known = os.path.exists(text)
            opened = self._real["io.open"](file, mode, *arguments, **options)
            if not known:
                self._made(text)
            return opened

        return self._point("open", text, action)

    def _sync(self, kind: str, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._watched(path) is None:
            self._real[kind](descriptor)
            return
        folder = os.path.isdir(path)

        def action() -> None:
            if folder:
                self._names_are_safe()
            else:
                number = self._id(os.fstat(descriptor).st_ino)
                self._synced[number] = self._content(f"/proc/self/fd/{descriptor}")

        self._point("fsync-folder" if folder else kind, path, action)

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        here, there = self._watched(source), self._watched(target)
        if here is None or there is None:
            self._real["replace"](source, target, **options)
            return

        def action() -> None:
            self._lose(there)
            number = os.readlink(here) if os.path.islink(here) else self._id_of(here)
            self._real["replace"](source, target, **options)
            self._changes.append(("unlink", here, 0))
            self._changes.append(("replaced", there, number))

        self._point("replace", there, action)

    def _unlink(self, path: Any, **options: Any) -> None:
        text = self._watched(path)
        if text is None or not os.path.lexists(text):
            self._real["unlink"](path, **options)
            return

        def action() -> None:
            self._lose(text)
            self._real["unlink"](path, **options)
            self._changes.append(("unlink", text, 0))

        self._point("unlink", text, action)

    def _symlink(self, source: Any, target: Any, **options: Any) -> None:
        self._real["symlink"](source, target, **options)
        text = self._watched(target)
        if text is not None:
            self._changes.append(("link", text, str(source)))

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._watched(path) is None:
            return int(self._real["pwrite"](descriptor, data, offset))
        return int(self._point("pwrite", path, lambda: self._real["pwrite"](descriptor, data, offset)))

    def _connect(self, database: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        text = self._watched(database) if isinstance(database, (str, Path)) and ":" not in str(database) else None
        if text is None:
            return self._real["connect"](database, *arguments, **options)
        disk = self

        class Watched(sqlite3.Connection):
            """A connection whose commits are points."""

            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                if statement.lstrip()[:6].upper() in {"SELECT", "PRAGMA", "BEGIN "} or self.in_transaction:
                    return super().execute(statement, *values)
                return disk._commit(text, self, super().execute, statement, *values)

            def executescript(self, script: str) -> sqlite3.Cursor:
                return disk._commit(text, self, super().executescript, script)

            def __exit__(self, *error: object) -> Any:
                if not self.in_transaction or error[0] is not None:
                    return super().__exit__(*error)
                return disk._commit(text, self, super().__exit__, *error)

        return disk._point(
            "open", text, lambda: self._real["connect"](database, *arguments, factory=Watched, **options)
        )

    def _commit(self, path: str, connection: sqlite3.Connection, action: Callable[..., Any], *values: Any) -> Any:
        return self._point("commit", path, lambda: self._after(path, connection, action, *values))

    def _after(self, path: str, connection: sqlite3.Connection, action: Callable[..., Any], *values: Any) -> Any:
        """Carry out a commit; what SQLite has synced by then is safe."""
        result = action(*values)
        if self._plan is None or self._plan.how != "power":
            return result
        log = f"{path}-wal"
        if connection.execute("PRAGMA synchronous").fetchone()[0] < 2:
            self._unsynced_logs.add(log)
        for one in (path, log):
            if os.path.exists(one):
                self._know(one)
        return result

    # -- what is known

    def _files(self) -> list[str]:
        """All that is no folder; a symbolic link to one is none."""
        found = []
        for root, folders, files in os.walk(self.folder):
            links = [one for one in folders if os.path.islink(os.path.join(root, one))]
            found += [os.path.join(root, one) for one in (*files, *links)]
        return found

    def _watched(self, path: Any) -> str | None:
        text = os.path.abspath(os.fspath(path)) if not isinstance(path, int) else ""
        text = os.fsdecode(text)
        return text if text.startswith(self.folder) else None

    def _short(self, path: str) -> str:
        parts = os.path.relpath(path, self.folder).split("/")
        parts[-1] = ".".join("*" if len(part) == 64 or part.isdigit() else part for part in parts[-1].split("."))
        return "/".join(parts)

    def _id(self, inode: int, *, fresh: bool = False) -> int:
        if fresh or inode not in self._ids:
            self._next_id += 1
            self._ids[inode] = self._next_id
        return self._ids[inode]

    def _id_of(self, path: str) -> int:
        return self._id(os.lstat(path).st_ino)

    def _made(self, path: str) -> None:
        self._changes.append(("link", path, self._id(os.stat(path).st_ino, fresh=True)))

    def _lose(self, path: str) -> None:
        """The file that has this name is about to have none."""
        if os.path.isfile(path) and not os.path.islink(path):
            self._ghosts[self._id_of(path)] = self._content(path)

    def _know(self, path: str) -> None:
        """A file is safe, name and content."""
        if os.path.islink(path):
            self._names[path] = os.readlink(path)
            return
        number = self._id_of(path)
        self._names[path], self._synced[number] = number, self._content(path)

    def _content(self, path: str) -> bytes:
        descriptor = self._real["open"](path, os.O_RDONLY)
        try:
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        finally:
            os.close(descriptor)

    def _names_are_safe(self) -> None:
        self._apply(len(self._changes))
        self._changes.clear()

    def _apply(self, count: int) -> None:
        for kind, path, number in self._changes[:count]:
            if kind == "unlink":
                self._names.pop(path, None)
            else:
                self._names[path] = number

    # -- the end

    def _die(self, plan: Plan) -> None:
        if plan.how == "power":
            self.cut(random.Random(plan.seed))
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(self, chance: random.Random) -> None:
        """Make the folder what a machine would find after the power was cut now."""
        now: dict[int, bytes] = dict(self._ghosts)
        for path in self._files():
            if not os.path.islink(path):
                now[self._id_of(path)] = self._content(path)
        count = chance.randint(0, len(self._changes))
        while count < len(self._changes) and self._changes[count][0] == "replaced":
            count += 1  # a rename is one change
        self._apply(count)
        found = {
            path: one if isinstance(one, str) else self._left(path, one, now, chance)
            for path, one in self._names.items()
        }
        for path in self._files():
            self._real["unlink"](path)
        for path, content in found.items():
            if path.endswith("-shm"):
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if isinstance(content, str):
                self._real["symlink"](content, path)
                continue
            descriptor = self._real["open"](path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(descriptor, content)
            os.close(descriptor)

    def _left(self, path: str, number: int, now: dict[int, bytes], chance: random.Random) -> bytes:
        """What is left of a file's content."""
        safe, current = self._synced.get(number, b""), now.get(number, b"")
        if path.endswith((".db", "-wal")):
            return self._left_of_log(path, safe, current, chance) if path.endswith("-wal") else safe
        fate = chance.choice(["safe", "current", "torn", "torn"])
        if fate != "torn":
            return safe if fate == "safe" else current
        size = chance.choice([len(safe), len(current)])
        mixed = bytearray(size)
        for start in range(0, size, BLOCK):
            source = chance.choice([safe, current])
            mixed[start : start + BLOCK] = source[start : min(start + BLOCK, size)].ljust(
                min(BLOCK, size - start), b"\0"
            )
        return bytes(mixed)

    def _left_of_log(self, path: str, safe: bytes, current: bytes, chance: random.Random) -> bytes:
        """Frames beyond what was synced may be there in part: SQLite's checksums tell."""
        if path in self._unsynced_logs:
            return current[: chance.randint(0, len(current))]
        if current[: len(safe)] != safe:
            return safe
        return current[: chance.randint(len(safe), len(current))]
