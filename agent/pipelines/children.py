"""The pipelines as the supervisor sees them: a child process each, started again when it ends."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.children import end_child, start_child
from agent.condition import Condition
from agent.config import Config
from agent.pipelines.config import PipelineConfig
from agent.pipelines.ipc import Begin, Fine, FromPipeline, Trouble
from agent.problems import PIPELINE_FAILED
from agent.serving.framing import FrameChannel

log = logging.getLogger("agent.pipelines")
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STEADY_S = 60.0  # who ran so long is started again at once
STOP_S = 8.0


@dataclass(frozen=True)
class PipelineSaid:
    """A pipeline's process told something; None: its stream has ended."""

    name: str
    generation: int
    message: FromPipeline | None


class _Child:
    """One pipeline."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: FrameChannel | None = None
        self.generation = 0
        self.start_at = 0.0
        self.started = 0.0
        self.pause_s = PAUSE_S
        self.holds: set[tuple[str, str]] = set()
        self.why = ""  # what it said last that does not go on


class Pipelines:
    """All of them; used by the supervisor's main thread.

    Args:
        config: of the agent.
        put: takes `PipelineSaid` events, from other threads.
        condition: notes problems.
    """

    def __init__(self, config: Config, put: Callable[[Any], None], condition: Condition) -> None:
        self._config, self._put, self._condition = config, put, condition
        self._children = {one.name: _Child(one) for one in config.pipelines}

    @property
    def busy(self) -> bool:
        """Whether one is to be started soon."""
        return any(child.process is None for child in self._children.values())

    def tick(self, now: float) -> None:
        """Start those that do not run."""
        for child in self._children.values():
            if child.process is None and now >= child.start_at:
                self._start(child, now)

    def said(self, event: PipelineSaid, now: float) -> None:
        """Take a word of a process."""
        child = self._children[event.name]
        if event.generation != child.generation or child.process is None:
            return
        match event.message:
            case Trouble(code=code, part=part, detail=detail, count=count, ongoing=ongoing):
                if ongoing:
                    child.holds.add((code, part))
                    child.why = detail
                self._condition.pipeline(
                    code, _subject(child, part), f"{event.name}: {detail}", count=count, ongoing=ongoing
                )
            case Fine(code=code, part=part):
                child.holds.discard((code, part))
                self._condition.pipeline_over(code, _subject(child, part))
            case None:
                self._ended(child, now)

    def stop(self) -> None:
        """End them all."""
        running = [child for child in self._children.values() if child.process is not None]
        for child in running:
            child.generation += 1
            assert child.channel is not None
            child.channel.shut()
        for child in running:
            self._reap(child, STOP_S)

    def _start(self, child: _Child, now: float) -> None:
        child.generation += 1
        child.started, child.why = now, ""
        try:
            child.process, sock = start_child("agent.pipelines.process")
        except OSError as error:
            self._later(child, now, f"its process can't be started: {error.strerror}; free memory or processes")
            return
        child.channel = FrameChannel(sock, FromPipeline)
        config = self._config
        folder = str(config.state_dir / "pipelines")
        child.channel.send(
            Begin(
                child.config,
                config.device_id,
                folder,
                config.listen,
                config.unix_socket,
                config.hang_s,
                config.log_level,
                config.log_format,
            )
        )
        threading.Thread(
            target=self._read, args=(child.config.name, child.channel, child.generation), daemon=True
        ).start()
        self._condition.pipeline_over(PIPELINE_FAILED, _subject(child, "process"))

    def _read(self, name: str, channel: FrameChannel, generation: int) -> None:
        while (message := channel.receive()) is not None:
            self._put(PipelineSaid(name, generation, message))
        self._put(PipelineSaid(name, generation, None))

    def _ended(self, child: _Child, now: float) -> None:
        status = self._reap(child)
        for code, part in child.holds:  # whether it still holds the next process finds out
            self._condition.pipeline_over(code, _subject(child, part))
        child.holds.clear()
        if now - child.started >= STEADY_S:
            child.pause_s = PAUSE_S
        why = f" ({child.why})" if child.why else ""
        self._later(child, now, f"its process ended with {status}{why}; it is started again")

    def _later(self, child: _Child, now: float, why: str) -> None:
        log.error("pipeline %s: %s", child.config.name, why)
        self._condition.pipeline(
            PIPELINE_FAILED, _subject(child, "process"), f"{child.config.name}: {why}", ongoing=True
        )
        child.start_at = now + child.pause_s
        child.pause_s = min(child.pause_s * 2, LONGEST_PAUSE_S)

    def _reap(self, child: _Child, within_s: float = 1.0) -> int:
        assert child.process is not None
        if child.channel is not None:
            child.channel.close()
        status = end_child(child.process, within_s)
        child.process, child.channel = None, None
        return status


def _subject(child: _Child, part: str) -> str:
    return f"{child.config.name}/{part}"
