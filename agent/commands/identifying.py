"""`identify`: the program that the device's owner configured, such as one that lets a light blink."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading

from agent.commands.execution import Outcome, RefusedError
from agent.protocol.commands import CommandPhase, CommandResult, plain
from agent.protocol.secrets import hide_secrets

OUTPUT_CHARS = 1000
LONGEST_S = 60.0


class Identifying:
    """The program at work.

    Args:
        program: with its arguments; no shell reads it.
        now: of a clock that is never set, in seconds.

    Raises:
        RefusedError: when it can't be started.
    """

    def __init__(self, program: tuple[str, ...], now: float) -> None:
        self._until = now + LONGEST_S
        self._output = b""
        try:
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            detail = f"{program[0]} can't be started ({error}): see commands.identify_program"
            raise RefusedError("identify_failed", detail) from None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Only the end is kept, however much it writes."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            while piece := os.read(pipe.fileno(), 4096):
                self._output = (self._output + piece)[-4 * OUTPUT_CHARS :]

    def step(self, now: float) -> Outcome | None:
        """Whether it has ended."""
        status = self._process.poll()
        if status is None and now < self._until:
            return None
        self.end()
        if status is None:
            detail = f"the program ran for more than {LONGEST_S:g} s and was ended"
            return Outcome(CommandPhase.FAILED, "identify_failed", detail, self._result())
        if status:
            detail = f"the program ended with {status}: see commands.identify_program"
            return Outcome(CommandPhase.FAILED, "identify_failed", detail, self._result())
        return Outcome(CommandPhase.SUCCEEDED, result=self._result())

    def end(self) -> Outcome | None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)
        return None

    def _result(self) -> CommandResult:
        return CommandResult(output=plain(hide_secrets(self._output.decode(errors="replace")))[-OUTPUT_CHARS:])


class Unidentified:
    """Where nothing is configured: that it was asked is in the log, and that is all."""

    def step(self, now: float) -> Outcome | None:  # noqa: ARG002
        """Say so."""
        detail = "nothing is configured that shows it (commands.identify_program): it is in the device's log only"
        return Outcome(CommandPhase.SUCCEEDED, detail=detail)

    def end(self) -> Outcome | None:
        """Nothing goes on."""
        return None
