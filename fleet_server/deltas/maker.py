"""Makes the encodings that open rollouts could use: one by one, each in a bounded child process, under a lease."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.children import end_group, last_words
from fleet_server.db import Database
from fleet_server.deltas import service
from fleet_server.deltas.process import ENCODED, RESULT
from fleet_server.deltas.service import WORTH, Pair
from fleet_server.errors import FleetError
from fleet_server.leases import DatabaseLease
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

log = logging.getLogger(__name__)
LEASE = "delta-maker"
LEASE_S = 30.0
TICK_S = 1.0
POLL_S = 0.2
HOLD_EVERY_S = 5.0
LOOK_EVERY_S = 2.0
SWEEP_EVERY_S = 600.0
LAST_WORDS = 300
FOLDERS = "delta-"  # begins the names of working folders


class _PutOffError(Exception):
    """An encoding is not made now; whoever looks next finds it wanted still."""


class DeltaMaker:
    """The thread; of several servers on one database, one at a time makes encodings."""

    def __init__(self, database: Database, artifacts: ArtifactStore, settings: Settings) -> None:
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, self.tick, TICK_S)
        self._sweep_at = 0.0

    def start(self) -> None:
        """Begin to look for what is wanted, where that is not switched off."""
        for left in self._settings.state_dir.glob(f"{FOLDERS}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a server that was killed
        if self._settings.deltas:
            self._ticker.start()

    def stop(self) -> None:
        """End the thread and the encoding it makes: it is made anew at the next start."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self) -> None:
        """Make what is wanted now."""
        now = time.monotonic()
        with self._database.read() as session:
            pairs = service.wanted(session)
        if not pairs and now < self._sweep_at:
            return
        if not self._lease.hold():
            return
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_EVERY_S
            self._sweep()
        if pairs:
            self._make(pairs[0])

    def _sweep(self) -> None:
        """Remove encodings of what is gone: rows first, so that no device is offered bytes that are not there."""
        with self._database.write() as session:
            digests = service.forget_orphans(session)
        for digest in digests:
            self._artifacts.delete(digest)

    def _make(self, pair: Pair) -> None:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=FOLDERS, dir=self._settings.state_dir) as name:
            folder = Path(name)
            try:
                self._artifacts.fetch_to(pair.artifact, folder / "target")
                if pair.base:
                    self._artifacts.fetch_to(pair.base, folder / "base")
                detail = self._run(folder, pair) or self._keep(pair, folder)
            except _PutOffError as reason:
                log.info("encoding of %s for holders of %s: put off, %s", pair.artifact[:12], pair.base[:12], reason)
                return
            except FleetError as error:
                detail = error.detail
            if detail:
                with self._database.write() as session:
                    service.record(session, pair, detail=detail)
        seconds = time.monotonic() - started
        said = detail or "made"
        log.info("encoding of %s for holders of %s: %s, %.1f s", pair.artifact[:12], pair.base[:12], said, seconds)

    def _run(self, folder: Path, pair: Pair) -> str:
        """Why the child failed; empty when it did not.

        Raises:
            _PutOffError: when it was ended because the server stops, or because a stage waits for a difference: to
                compress a large artifact whole takes minutes, and no stage waits for that.
        """
        limit = self._settings.delta_memory_mb
        command = [sys.executable, "-m", "fleet_server.deltas.process", str(folder)]
        command += ["--memory-mb", str(limit), "--parent", str(os.getpid())]
        with (folder / "stderr").open("wb") as stderr:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        deadline = time.monotonic() + self._settings.delta_timeout_s
        hold_at, look_at = time.monotonic() + HOLD_EVERY_S, time.monotonic() + LOOK_EVERY_S
        try:
            while child.poll() is None:
                now = time.monotonic()
                if self._ticker.rest(POLL_S):
                    raise _PutOffError("the server stops")
                if not pair.base and now > look_at:
                    look_at = now + LOOK_EVERY_S
                    if self._difference_wanted():
                        raise _PutOffError("a difference is wanted")
                if now > deadline:
                    return f"it took longer than {self._settings.delta_timeout_s:g} s (SHOAL_DELTA_TIMEOUT_S)"
                if now > hold_at:
                    hold_at = now + HOLD_EVERY_S
                    self._lease.hold()
        finally:
            end_group(child)
        if child.returncode == 0:
            return ""
        tail = last_words(folder / "stderr", LAST_WORDS)
        log.warning("an encoding process ended with %d; its last words: %s", child.returncode, tail)
        return f"the encoding process ended with {child.returncode} (it may use {limit} MiB: SHOAL_DELTA_MEMORY_MB)"

    def _difference_wanted(self) -> bool:
        with self._database.read() as session:
            return any(one.base for one in service.wanted(session))

    def _keep(self, pair: Pair, folder: Path) -> str:
        """Store what was made; or why it is not worth it."""
        result = json.loads((folder / RESULT).read_text())
        whole = (folder / "target").stat().st_size
        if result["size"] > WORTH * whole:
            return f"the best ({result['plan']}) has {result['size']} of {whole} bytes: not worth a device's work"
        digest, size = self._artifacts.put_file(folder / ENCODED)
        with self._database.write() as session:
            service.record(session, pair, codec=result["codec"], digest=digest, size=size, detail=result["plan"])
        return ""
