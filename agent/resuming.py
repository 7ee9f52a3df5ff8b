"""What served before an end of the agent serves again, before the rest of the agent is there.

The agent's files are opened, and the worker, which is importing meanwhile, is told what to load. Only what is active
is: it was tried and proved itself, and its bytes are looked at like before every load. All else waits for the
supervisor, which takes over from here.
"""

from __future__ import annotations

import logging
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.config import Config
from agent.files import remove_leftovers
from agent.head_start import Spawned
from agent.protocol.lifecycle import Phase
from agent.releases.handover import Inherited, OldWorker
from agent.serving.ipc import Declare, Expect, Load
from agent.update.journal import Journal
from agent.update.lastgood import LastGood
from agent.update.store import ArtifactStore
from agent.update.updater import Record, Updater
from agent.worker_process import WorkerProcess

log = logging.getLogger("agent")


@dataclass(frozen=True)
class Files:
    """What the agent keeps of its deployments, and what it makes of it.

    Attributes:
        store: artifacts.
        journal: written before anything is done.
        updater: decides, from what the journal holds.
        good: what served well.
    """

    store: ArtifactStore
    journal: Journal
    updater: Updater
    good: LastGood

    @staticmethod
    def open(config: Config) -> Files:
        """The files of a device; those that can't be read or written say so, and are replaced."""
        config.state_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(config.state_dir)
        store = ArtifactStore(
            config.state_dir / "artifacts",
            floor_bytes=int(config.disk_floor_mb * 2**20),
            keep_bytes=int(config.store_keep_mb * 2**20),
        )
        journal = Journal(config.state_dir / "journal.db")
        updater = Updater(journal.load(), int(journal.number("revision", 0)))
        return Files(store, journal, updater, LastGood(config.state_dir / "serving.json"))

    def expected(self) -> frozenset[str]:
        """Models that ought to be served."""
        active = (one.manifest.model for one in self.updater.records.values() if one.phase is Phase.ACTIVE)
        return frozenset({*self.good.models, *active})


@dataclass
class Resumed:
    """How far it has come when the supervisor takes over.

    Attributes:
        files: opened.
        events: what the worker says, for the supervisor's main loop.
        worker: the process.
        loads: deployments that it was told to load, by the request's id; None where it was told nothing.
        old_worker: that of the version of the agent before, which answers still; None where there is none.
    """

    files: Files
    events: queue.SimpleQueue[Any]
    worker: WorkerProcess
    loads: dict[int, str] | None = field(default=None)
    old_worker: OldWorker | None = None


def resume(config: Config, spawned: Spawned | None, inherited: Inherited | None = None) -> Resumed:
    """Let the worker load what was active, and answer with it as soon as it can.

    Args:
        config: of the agent.
        spawned: the worker's process, where that was begun before.
        inherited: what the version of the agent before handed over.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handed = inherited or Inherited()
    files, worker = Files.open(config), WorkerProcess(config, events.put, spawned, handed.listeners)
    resumed = Resumed(files, events, worker)
    if handed.worker is not None:
        resumed.old_worker = OldWorker(socket.socket(fileno=handed.worker))
    try:
        worker.start()
    except OSError as error:
        log.debug("the supervisor tries it again, and says so: %s", error)
        return resumed
    if config.ensembles:
        worker.send(Declare(config.ensembles))
    active = [one for one in files.updater.records.values() if one.phase is Phase.ACTIVE]
    resumed.loads = dict(enumerate((one.deployment_id for one in _told(active, files.store, worker.send)), start=1))
    worker.send(Expect(tuple(sorted(files.expected()))))
    return resumed


def _told(active: list[Record], store: ArtifactStore, send: Callable[[Load], bool]) -> list[Record]:
    """Those of active deployments that the worker was told to load: a damaged artifact is the supervisor's to judge."""
    told: list[Record] = []
    for record in active:
        if store.verify(record.manifest.digest):
            told.append(record)
            send(load_of(record, store, len(told), serve=True))
    return told


def load_of(record: Record, store: ArtifactStore, request_id: int, *, serve: bool = False) -> Load:
    """How the worker is told to load what is no trial any more: on any provider, with no golden answers."""
    digest = record.manifest.digest
    path, compiled = str(store.path(digest)), str(store.compiled(digest))
    return Load(request_id, record.deployment_id, record.manifest, path, compiled=compiled, serve=serve)
