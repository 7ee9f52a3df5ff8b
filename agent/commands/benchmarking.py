"""`benchmark`: the served models, one after another, each in a process of its own (`agent.commands.benchmark`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent.commands.benchmark_job import JOB_FILE, RESULT_FILE, BenchmarkJob
from agent.commands.execution import Outcome
from agent.protocol.commands import CommandPhase, CommandResult, ModelBenchmark
from agent.protocol.manifest import Manifest
from agent.update.store import ArtifactStore

WAITS_S = 60.0
LONGEST_LOAD_S = 300.0  # beside the seconds that it is run for
TAIL_BYTES = 500


class Serving(Protocol):
    """What serves."""

    @property
    def settled(self) -> bool:
        """Whether nothing is being loaded."""
        ...

    def served(self) -> list[Manifest]:
        """Manifests of what answers requests."""
        ...


class Benchmarking:
    """Benchmarks some models.

    Args:
        runtime: what serves.
        models: only these; empty for all.
        store: where the artifacts are.
        folder: for what the processes read and write; made, and removed at the end.
        seconds: how long each is run.
        environment: of the processes.
        now: of a clock that is never set, in seconds.
    """

    def __init__(
        self,
        runtime: Serving,
        models: Sequence[str],
        store: ArtifactStore,
        folder: Path,
        *,
        seconds: float,
        environment: Mapping[str, str],
        now: float,
    ) -> None:
        self._runtime, self._models = runtime, frozenset(models)
        self._waits_until = now + WAITS_S
        self._waiting: deque[Manifest] | None = None  # until what ought to serve does
        self._store, self._folder = store, folder
        self._seconds, self._environment = seconds, dict(environment)
        self._done: list[ModelBenchmark] = []
        self._now: Manifest | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._until = 0.0

    def step(self, now: float) -> Outcome | None:
        """Look at the one that is run, or begin the next."""
        if self._waiting is None:
            return self._look(now)
        if self._process is not None:
            self._watch(self._process, now)
        elif self._waiting:
            self._start(self._waiting.popleft(), now)
        else:
            return self._outcome()
        return None

    def _look(self, now: float) -> Outcome | None:
        """Wait until what ought to serve does, as it does not yet when an agent starts."""
        if not self._runtime.settled and now < self._waits_until:
            return None
        served = self._runtime.served()
        self._waiting = deque(one for one in served if not self._models or one.model in self._models)
        if self._waiting:
            return None
        detail = "no such model serves on this device: see `shoal device show`"
        return Outcome(CommandPhase.FAILED, "nothing_serves", detail)

    def end(self) -> Outcome | None:
        """End the process; what was measured by then is told where some of it was."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
        if not self._done:
            return None
        result = CommandResult(benchmarks=tuple(self._done))
        detail = f"its time was over after {len(self._done)} models: give it more (timeout_s)"
        return Outcome(CommandPhase.TIMED_OUT, "timeout", detail, result)

    def _start(self, manifest: Manifest, now: float) -> None:
        golden = manifest.golden
        golden_path = str(self._store.path(golden.digest)) if golden and self._store.has(golden.digest) else ""
        job = BenchmarkJob(manifest, str(self._store.path(manifest.digest)), golden_path, self._seconds)
        self._now, self._until = manifest, now + 2 * self._seconds + LONGEST_LOAD_S
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / RESULT_FILE).unlink(missing_ok=True)
            (self._folder / JOB_FILE).write_bytes(msgspec.json.encode(job))
            with (self._folder / "stderr").open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "agent.commands.benchmark", str(self._folder), "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**self._environment, **os.environ},
                )
        except OSError as error:
            self._failed(f"the process that runs it can't be started: {error.strerror}")

    def _watch(self, process: subprocess.Popen[bytes], now: float) -> None:
        status = process.poll()
        if status is None and now < self._until:
            return
        self._process = None
        if status is None:
            process.kill()
            process.wait()
            self._failed(f"it took longer than {2 * self._seconds + LONGEST_LOAD_S:.0f} s")
            return
        try:
            found = msgspec.json.decode((self._folder / RESULT_FILE).read_bytes(), type=ModelBenchmark)
        except (OSError, msgspec.MsgspecError):
            self._failed(f"the process that ran it ended with {status}: {self._tail() or 'it said nothing'}")
        else:
            self._done.append(found)

    def _failed(self, detail: str) -> None:
        assert self._now is not None
        self._done.append(ModelBenchmark(self._now.model, self._now.version, failure=detail))

    def _tail(self) -> str:
        try:
            return (self._folder / "stderr").read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return ""

    def _outcome(self) -> Outcome:
        shutil.rmtree(self._folder, ignore_errors=True)
        result = CommandResult(benchmarks=tuple(self._done))
        failed = [one for one in self._done if one.failure]
        if len(failed) < len(self._done):
            return Outcome(CommandPhase.SUCCEEDED, result=result)
        detail = f"no model could be benchmarked: {failed[0].model}: {failed[0].failure}"
        return Outcome(CommandPhase.FAILED, "benchmark_failed", detail[:1000], result)
