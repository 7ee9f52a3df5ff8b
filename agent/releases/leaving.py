"""How an agent ends so that another version of it goes on: who may be asked meanwhile, and what is handed over."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.config import Config
from agent.inference import Inference
from agent.launcher import RELEASE
from agent.peers.balancing import takes_peers
from agent.releases.handover import OldWorker, hand_over
from agent.releases.releases import Start
from agent.telemetry.host import free_memory_mb
from agent.update.retriever import Connection

log = logging.getLogger("agent.releases")
OLD_WORKER_S = 60.0  # that the worker before answers beside a new one that does not serve as it did
MEMORY_LEFT_MB = 32.0  # that two workers must leave to others


class Leaving:
    """What the agent's releases need of the rest of it.

    Args:
        config: of the agent.
        start: how it was started.
        link: whether there is one.
        inference: the worker, and what serves.
        busy: what must be over before the agent may end, in a few words, and whether it goes on.
        old_worker: of the version before; None where there is none.
        stop: ends the main loop.
        go_on: this agent has proved itself.

    Attributes:
        leaves: whether the agent ends for another version of it.
    """

    def __init__(
        self,
        config: Config,
        start: Start,
        link: Connection,
        inference: Inference,
        *,
        busy: Mapping[str, Callable[[], bool]],
        old_worker: OldWorker | None,
        stop: Callable[[], None],
        go_on: Callable[[], None],
    ) -> None:
        self._config, self._start, self._link, self._inference = config, start, link, inference
        self._busy, self._old_worker, self._stop, self._go_on = busy, old_worker, stop, go_on
        self.leaves = False
        self._variables: dict[str, str] = {}
        self._old_until = time.monotonic() + OLD_WORKER_S

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._link.connected

    def unready(self) -> str:
        """What keeps its models from being served, in a few words; empty when nothing does."""
        return "" if self._inference.settled else "its inference worker is not ready, or loads still"

    def serving(self) -> dict[str, str]:
        """Digests by model, of what answers requests."""
        return {one.model: one.digest for one in self._inference.serving}

    def occupied(self) -> str:
        """What must be over before the agent may end, in a few words; empty when nothing must."""
        if not self._inference.settled or self._inference.watched:
            return "a version is being loaded or watched"
        return next((what for what, goes_on in self._busy.items() if goes_on()), "")

    def leave(self) -> None:
        """End, and become the launcher."""
        self.leaves = True
        self._stop()

    def proved(self) -> None:
        """The version that runs is no trial any more."""
        self._end_old_worker()
        self._go_on()

    def tick(self, *, on_trial: bool) -> None:
        """Let the worker before end when it is of no use any more: on trial it stays, to be there if that fails."""
        if self._old_worker is None:
            return
        self._old_worker.drain()
        if not on_trial and (self._inference.settled or time.monotonic() > self._old_until):
            self._end_old_worker()

    def end(self) -> None:
        """Let go of the worker and its sockets; one who leaves hands them over."""
        self._end_old_worker()
        if not self.leaves:
            self._inference.stop()
            return
        # A second one that answers by gRPC, or for peers, could not have its addresses.
        alone = bool(self._config.grpc.addresses) or takes_peers(self._config)
        answering = not alone and self._room_for_two()
        self._variables = hand_over(*self._inference.hand_over(answering=answering))

    def become_next(self) -> None:
        """Become the launcher, where the agent left for another version of it; else nothing."""
        if not self.leaves:
            return
        environment = {**os.environ, **self._variables}
        for name in (RELEASE, "PYTHONPATH", "PYTHONSAFEPATH"):
            environment.pop(name, None)
        if self._start.path:
            environment["PYTHONPATH"] = self._start.path
        command = self._start.command
        os.execve(command[0], command, environment)  # noqa: S606 (no shell is what is wanted)

    def _room_for_two(self) -> bool:
        """Whether memory is there for a second worker beside this one."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self._inference.pid}/statm").read_text().split()[1])
            taken_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            if free_memory_mb() >= taken_mb + MEMORY_LEFT_MB:
                return True
            log.warning("memory is short: the worker ends before the next version's begins, and requests wait")
        return False

    def _end_old_worker(self) -> None:
        if self._old_worker is not None:
            self._old_worker.end()
            self._old_worker = None
