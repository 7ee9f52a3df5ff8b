"""Watches versions that have just begun to serve; says when the watching is over, or why one did badly: pure."""

from __future__ import annotations

from dataclasses import dataclass

from agent.protocol.messages import ModelWindow

ERROR_SHARE = 0.2
FEWEST_REQUESTS = 5


@dataclass
class _Watch:
    until: float
    requests: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Over:
    """The watching of a deployment ended, with its problem if it had one."""

    deployment_id: str
    problem: str | None


class Probation:
    """The versions that are being watched. The clock is passed in, in seconds."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watch] = {}

    @property
    def active(self) -> bool:
        """Whether anything is being watched."""
        return bool(self._watched)

    def begin(self, deployment_id: str, seconds: float, now: float) -> None:
        """Watch a deployment that serves from now on."""
        self._watched[deployment_id] = _Watch(now + seconds)

    def window(self, model: ModelWindow) -> None:
        """Take in what the worker counted since the last time."""
        watch = self._watched.get(model.deployment_id)
        if watch is not None:
            watch.requests += model.requests
            watch.errors += model.errors

    def tick(self, now: float) -> list[Over]:
        """Which watchings are over, by time or by a problem."""
        found = []
        for deployment_id, watch in list(self._watched.items()):
            problem = None
            if watch.requests >= FEWEST_REQUESTS and watch.errors > watch.requests * ERROR_SHARE:
                problem = f"{watch.errors} of {watch.requests} requests failed while the version was watched"
            if problem or now >= watch.until:
                del self._watched[deployment_id]
                found.append(Over(deployment_id, problem))
        return found

    def clear(self) -> None:
        """The worker died, and with it what was watched."""
        self._watched.clear()
