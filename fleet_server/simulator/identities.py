"""Certificates of simulated devices: each enrols by the agent's own code, and keeps what it got in a folder.

A device that has enrolled before is not enrolled again: the folder serves the next simulation of the same devices.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.config import Config
from agent.enrolment import Request, enroll
from agent.errors import AgentError
from agent.identity import identity_folder, load_identity, load_into

ENROLLED_AT_ONCE = 4


class IdentitiesError(Exception):
    """A device has no certificate, or can't get one; the message says what would mend it."""


class Identities:
    """The identities in a folder, a folder a device.

    Args:
        folder: holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _state_dir(self, device_id: str) -> Path:
        return self._folder / device_id

    def enrol(
        self, device_ids: Sequence[str], request: Request, told: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Enrol those that have not enrolled yet.

        Args:
            device_ids: all of them.
            request: where, and by what right.
            told: is told how many of how many have their certificates.

        Raises:
            IdentitiesError: when the server refuses one, or the folder can't be written.
        """
        try:
            absent = [one for one in device_ids if load_identity(identity_folder(self._state_dir(one))) is None]
            with ThreadPoolExecutor(ENROLLED_AT_ONCE, thread_name_prefix="enrolment") as threads:
                done = threads.map(lambda one: self._enrol(one, request), absent)
                for number, _ in enumerate(done, 1):
                    told(number, len(absent))
        except AgentError as error:
            raise IdentitiesError(str(error)) from None

    def _enrol(self, device_id: str, request: Request) -> None:
        config = Config(device_id=device_id, state_dir=self._state_dir(device_id))
        enroll(config, request, lambda _said: None)

    def context(self, device_id: str) -> ssl.SSLContext:
        """What a device connects with; made for each connection, since thousands of them would take their memory.

        Raises:
            IdentitiesError: when the device has no certificate.
        """
        folder = identity_folder(self._state_dir(device_id))
        try:
            identity = load_identity(folder)
            if identity is None:
                raise IdentitiesError(f"{device_id} has no certificate in {self._folder}: give --enroll a token")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            load_into(context, folder, identity)
        except AgentError as error:
            raise IdentitiesError(str(error)) from None
        return context
