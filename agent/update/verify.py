"""Has manifests judged by the verifying process, and fetches the metadata it wants over MQTT.

It has no thread but the one that reads the process's words: the supervisor calls `tick`. While the link is down, or the
server does not answer, what waits goes on waiting; nothing fails by that.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from agent.children import end_child, start_child
from agent.config import Config
from agent.errors import IdentityError
from agent.identity import identity_folder, load_identity
from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import TrustNeed, TrustPiece
from agent.serving.framing import FrameChannel
from agent.update.trust_ipc import Ask, CheckTargets, FromTrust, Later, Piece, Target, Verdict

log = logging.getLogger("agent.trust")
RESEND_S = 3.0
ASKED = 5  # times for one piece, before it is tried again later
LONGEST_S = 180.0  # that a process may take
PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0
DEATHS = 5
FIRST_USE = (
    "INSECURE: this device neither enrolled nor has a root_file, so whatever root metadata the server sends first is "
    "trusted from then on. That is for trying Shoal on one machine: enrol it, or name a root_file, for anything else"
)


def given_root(config: Config) -> bytes | None:
    """Root metadata that the device was given: by its configuration, else when it enrolled; None where by neither.

    Raises:
        OSError: when the configured file can't be read.
        IdentityError: when the identity can't.
    """
    if config.root_file:
        return Path(config.root_file).read_bytes()
    identity = load_identity(identity_folder(config.state_dir))
    return msgspec.json.encode(identity.trust_root) if identity and identity.trust_root else None


class Connection(Protocol):
    """What verifying needs of the link."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        ...


class TrustSaid:
    """A word of the verifying process; None when its stream has ended."""

    def __init__(self, generation: int, message: FromTrust | None) -> None:
        self.generation = generation
        self.message = message


class Verifier:
    """Judges manifests, as many at once as wait.

    Args:
        config: the trusted root, the state folder, the grace.
        link: whether there is one.
        put: takes what the process says, for `said`; called from another thread.
        say_need: asks the server for a piece of metadata.
        answered: takes a verdict: key, code (None when trusted), detail.
        first_use: whether the root that comes first may be trusted at all.
    """

    def __init__(
        self,
        config: Config,
        link: Connection,
        put: Callable[[TrustSaid], None],
        *,
        say_need: Callable[[TrustNeed], None],
        answered: Callable[[str, WireErrorCode | None, str], None],
        first_use: bool = True,
    ) -> None:
        self._config = config
        self._link = link
        self._put = put
        self._say_need = say_need
        self._answered = answered
        self._first_use = first_use
        self._jobs: dict[str, tuple[Target, ...]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: FrameChannel | None = None
        self._generation = 0
        self._asking: Ask | None = None
        self._asked = 0
        self._ask_at = 0.0
        self._until = 0.0
        self._not_before = 0.0
        self._pause = PAUSE_S
        self._deaths = 0

    @property
    def idle(self) -> bool:
        """Whether no process is judging."""
        return self._process is None

    def check(self, key: str, targets: tuple[Target, ...]) -> None:
        """Judge targets as soon as may be; a key that waits already is left as it is."""
        self._jobs.setdefault(key, targets)

    def cancel(self, key: str) -> None:
        """A verdict is not wanted any more."""
        self._jobs.pop(key, None)

    def link_up(self) -> None:
        """Try at once."""
        self._not_before, self._ask_at, self._pause = 0.0, 0.0, PAUSE_S

    def piece(self, piece: TrustPiece) -> None:
        """Take what the server answered, if that is what was asked."""
        if self._asking is not None and (piece.file, piece.offset) == (self._asking.file, self._asking.offset):
            self._answer(piece)

    def said(self, word: TrustSaid, now: float) -> None:
        """Take a word of the process."""
        if word.generation != self._generation or self._process is None:
            return
        match word.message:
            case Ask():
                self._asking, self._asked, self._ask_at = word.message, 0, now
                self._tick_ask(now)
            case Verdict(key=key, code=code, detail=detail):
                self._deaths, self._pause = 0, PAUSE_S
                if self._jobs.pop(key, None) is not None:
                    self._answered(key, code, detail[:2000])
            case Later(detail=detail):
                log.info("trust metadata could not be had (%s); trying again in %.0f s", detail, self._pause)
                self._deaths = 0
                self._end()
                self._wait(now)
            case _:
                self._ended(now)

    @property
    def busy(self) -> bool:
        """Whether something is being judged, or could be."""
        return self._process is not None or (bool(self._jobs) and self._link.connected)

    def tick(self, now: float) -> None:
        """Start a process when something waits; ask again; end one that takes too long."""
        if self._process is None:
            if self._jobs and self._link.connected and now >= self._not_before:
                self._start(now)
        elif now > self._until:
            log.warning("verifying took longer than %.0f s; trying again", LONGEST_S)
            self._end()
            self._wait(now)
        else:
            self._tick_ask(now)

    def stop(self) -> None:
        """End the process."""
        self._end()

    def _start(self, now: float) -> None:
        try:
            root = given_root(self._config)
        except (OSError, IdentityError) as error:
            log.error("no manifest can be judged, the trusted root can't be read: %s", error)  # noqa: TRY400
            self._wait(now)
            return
        folder = self._config.state_dir / "trust"
        first_use = self._first_use and root is None and self._config.broker_is_local
        if first_use and not folder.exists():
            log.warning(FIRST_USE)
        self._generation += 1
        try:
            self._process, sock = start_child("agent.update.trust_process")
        except OSError as error:
            log.error("no manifest can be judged, no process can be started: %s", error.strerror)  # noqa: TRY400
            self._wait(now)
            return
        self._channel = FrameChannel(sock, FromTrust)
        self._channel.send(CheckTargets(str(folder), root, first_use, self._config.expired_grace_s, dict(self._jobs)))
        self._until = now + LONGEST_S
        threading.Thread(target=self._read, args=(self._channel, self._generation), daemon=True).start()

    def _read(self, channel: FrameChannel, generation: int) -> None:
        message: Any = channel.receive()
        while message is not None:
            self._put(TrustSaid(generation, message))
            message = channel.receive()
        self._put(TrustSaid(generation, None))

    def _tick_ask(self, now: float) -> None:
        if self._asking is None or now < self._ask_at:
            return
        if self._asked >= ASKED:
            self._answer(None)
            return
        self._asked, self._ask_at = self._asked + 1, now + RESEND_S
        self._say_need(TrustNeed(self._asking.file, self._asking.offset))

    def _answer(self, piece: TrustPiece | None) -> None:
        self._asking = None
        if self._channel is not None:
            self._channel.send(Piece(piece))

    def _ended(self, now: float) -> None:
        """The process is gone: with everything judged, or by a fault of its own."""
        judged = set(self._jobs)
        status = self._end()
        if status == 0:
            return
        self._deaths += 1
        log.error("the verifying process ended with %s", status)
        if self._deaths < DEATHS:
            self._wait(now)
            return
        self._deaths = 0
        for key in judged:
            del self._jobs[key]
            self._answered(key, WireErrorCode.INTERNAL, f"verifying its signature ended {DEATHS} processes: {status}")

    def _end(self) -> int | None:
        """The exit status of a process that ended by itself; one that has not is killed."""
        if self._process is None or self._channel is None:
            return None
        self._generation += 1
        self._asking = None
        status = end_child(self._process, 1)
        self._channel.close()
        self._process, self._channel = None, None
        return status

    def _wait(self, now: float) -> None:
        self._not_before = now + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE_S)
