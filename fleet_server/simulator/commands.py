"""A simulated device's commands: the agent's desk decides which are begun, with made-up work behind it. Pure.

What is believable follows from what the device is and does: a benchmark finds the latencies that its requests have, a
log tells what its deployments went through, a restart takes as long as its models take to load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from agent.commands.desk import CommandDesk
from agent.commands.execution import Execution, Outcome, RefusedError
from agent.commands.following import Following
from agent.commands.ring import LogRing
from agent.protocol.commands import Command, CommandAnswer, CommandKind, CommandPhase, CommandResult, ModelBenchmark
from fleet_server.simulator.behaviours import CommandConduct
from fleet_server.simulator.chances import drawn
from fleet_server.simulator.deployments import WORKER_RESTART_S
from fleet_server.simulator.inference import Inference

KEPT_ANSWERS = 256
FACTS_S, IDENTIFY_S = 0.5, 1.0
CODES = {
    CommandKind.RESTART_RUNTIME: "worker_failed",
    CommandKind.BENCHMARK: "benchmark_failed",
    CommandKind.FACTS: "measuring_failed",
    CommandKind.IDENTIFY: "identify_failed",
    CommandKind.LOGS: "internal",
}


class Book:
    """Which commands it has acted on, in memory: a simulated device's disk outlives its reboots."""

    lasts = True

    def __init__(self) -> None:
        self._answers: dict[str, CommandAnswer] = {}

    def answer(self, command_id: str) -> CommandAnswer | None:
        """What was last said of a command; None for one that is new."""
        return self._answers.get(command_id)

    def note(self, answer: CommandAnswer) -> None:
        """A command has come so far; of the oldest nothing is known any more."""
        self._answers[answer.command_id] = answer
        while len(self._answers) > KEPT_ANSWERS:
            del self._answers[next(iter(self._answers))]

    def interrupt(self) -> None:
        """The device ended: what went on has failed."""
        detail = "the agent ended while it carried this out; it is not begun again: look, then send another"
        for key, answer in self._answers.items():
            if answer.phase is CommandPhase.RUNNING:
                self._answers[key] = CommandAnswer(key, CommandPhase.FAILED, "interrupted", detail)


@dataclass
class Working:
    """Something that takes a while, and then has come to something.

    Attributes:
        until: when it is over.
        finish: what it came to.
    """

    until: float
    finish: Callable[[float], Outcome]

    def step(self, now: float) -> Outcome | None:
        """Go on."""
        return self.finish(now) if now >= self.until else None

    def end(self) -> Outcome | None:
        """Leave it off."""
        return None


@dataclass
class Delayed:
    """Something that begins later."""

    begin: float
    execution: Execution

    def step(self, now: float) -> Outcome | None:
        """Go on, once it has begun."""
        return self.execution.step(now) if now >= self.begin else None

    def end(self) -> Outcome | None:
        """Leave it off."""
        return self.execution.end()


class Commands:
    """The commands of one device since it started.

    Args:
        book: which it has acted on.
        log: of its agent.
        allowed: by the name of each command, whether its owner allows it.
        conduct: how slow it is, how often it fails.
        inference: its worker.
        load_s: that a model takes to load.
        chance: a number from 0 to 1, drawn anew with each call.
        report: have the device report its facts.
        restart: replace its worker; false where that can't be now.
        say: says an answer; false where there is no connection: the server asks again.
    """

    def __init__(
        self,
        book: Book,
        log: LogRing,
        allowed: Mapping[str, bool],
        conduct: CommandConduct,
        inference: Inference,
        load_s: float,
        chance: Callable[[], float],
        *,
        report: Callable[[], None],
        restart: Callable[[], bool],
        say: Callable[[CommandAnswer], bool],
    ) -> None:
        self._log, self._conduct, self._inference, self._load_s = log, conduct, inference, load_s
        self._chance, self._report, self._restart, self._answer = chance, report, restart, say
        starters = {
            CommandKind.LOGS: self._follow,
            CommandKind.BENCHMARK: self._benchmark,
            CommandKind.FACTS: self._facts,
            CommandKind.IDENTIFY: self._identify,
            CommandKind.RESTART_RUNTIME: self._restarting,
        }
        self._desk = CommandDesk(book, allowed, starters, self._say)
        self._open: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether one goes on."""
        return bool(self._open)

    def received(self, command: Command, now: float, wall: float) -> None:
        """Begin one, leave one off, or say again what became of it.

        Args:
            command: as the server sent it.
            now: true time, in Unix seconds.
            wall: by the device's clock.
        """
        if not command.cancel:
            self._log.add(wall, "WARNING", "agent", "agent.commands", f"command {command.command_id}: {command.kind}")
        self._desk.received(command, now, wall)

    def tick(self, now: float) -> None:
        """Let those that go on go on."""
        self._desk.tick(now)

    def _say(self, answer: CommandAnswer) -> bool:
        if answer.phase is CommandPhase.RUNNING:
            self._open.add(answer.command_id)
        else:
            self._open.discard(answer.command_id)
        return self._answer(answer)

    # -- how each is begun

    def _work(
        self, command: Command, now: float, seconds: float, finish: Callable[[float], CommandResult]
    ) -> Execution:
        kind = CommandKind(command.kind)
        fails = self._chance() < self._conduct.fails

        def over(at: float) -> Outcome:
            return _failed(kind) if fails else Outcome(CommandPhase.SUCCEEDED, result=finish(at))

        return Working(now + seconds + drawn(self._conduct.delay_s), over)

    def _facts(self, command: Command, now: float) -> Execution:
        def finish(_: float) -> CommandResult:
            self._report()
            return CommandResult()

        return self._work(command, now, FACTS_S, finish)

    def _identify(self, command: Command, now: float) -> Execution:
        return self._work(command, now, IDENTIFY_S, lambda _: CommandResult(output="the light blinks (simulated)"))

    def _restarting(self, command: Command, now: float) -> Execution:
        models = tuple(sorted(one.model for one in self._inference.serving))
        took = round(WORKER_RESTART_S + self._load_s + 0.1, 3)

        if not self._restart():
            raise RefusedError("busy", "a version is loaded or watched, and would be blamed: wait until that is over")
        return self._work(command, now, took, lambda _: CommandResult(models=models, took_s=took))

    def _benchmark(self, command: Command, now: float) -> Execution:
        given = command.arguments
        wanted = [one for one in self._inference.serving if not given.models or one.model in given.models]
        missing = sorted(set(given.models) - {one.model for one in wanted})
        if missing or not wanted:
            detail = f"{missing[0]} does not serve here" if missing else "no model serves here: deploy one first"
            raise RefusedError("nothing_serves", detail)

        def finish(at: float) -> CommandResult:
            return CommandResult(benchmarks=tuple(self._measured(at, given.seconds, set(given.models))))

        return self._work(command, now, given.seconds * len(wanted), finish)

    def _measured(self, now: float, seconds: float, models: set[str]) -> Iterator[ModelBenchmark]:
        for one in self._inference.serving:
            if models and one.model not in models:
                continue
            load = self._inference.load_of(one.deployment_id, now)
            if load is None:
                continue
            rows_per_s = 1 / (load.median_s * float(np.exp(load.sigma**2 / 2)))
            p50, p95, p99 = (1000 * load.median_s * float(np.exp(load.sigma * z)) for z in (0.0, 1.645, 2.326))
            yield ModelBenchmark(
                model=one.model,
                version=one.version,
                runtime=one.runtime,
                provider=one.provider,
                runs=max(1, int(seconds * rows_per_s)),
                latency_p50_ms=round(p50, 3),
                latency_p95_ms=round(p95, 3),
                latency_p99_ms=round(p99, 3),
                rows_per_s=round(rows_per_s, 1),
            )

    def _follow(self, command: Command, now: float) -> Execution:
        delay_s = drawn(self._conduct.delay_s)
        if self._chance() < self._conduct.fails:
            return Working(now + delay_s, lambda _: _failed(CommandKind.LOGS))
        reader = Following(command.command_id, command.arguments, self._log, self._answer)
        return Delayed(now + delay_s, reader)


def _failed(kind: CommandKind) -> Outcome:
    detail = "it failed: the simulation's behaviours say so (commands.fails)"
    return Outcome(CommandPhase.FAILED, CODES[kind], detail)
