"""What one version of the agent hands to the next: the sockets that clients connect to, and the worker that answers.

The new supervisor is the same process or a child of its launcher, and has the descriptors; the environment says which
they are. The old worker goes on answering until the new one serves the same, and the new agent has proved itself.
It imports next to nothing: the agent begins with it.
"""

from __future__ import annotations

import os

from agent.launcher import SOCKETS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence


class Inherited:
    """Descriptors that came from the version before: whoever takes one owns it.

    Args:
        listeners: of sockets that listen.
        worker: of our end of its worker's stream; None where there is none.
    """

    def __init__(self, listeners: Sequence[int] = (), worker: int | None = None) -> None:
        self.listeners, self.worker = list(listeners), worker


def take() -> Inherited:
    """What was handed over; no process that is started from now on has it."""
    told = os.environ.pop(SOCKETS, "")
    if not told:
        return Inherited()
    import json

    try:
        found = json.loads(told)
        inherited = Inherited([int(one) for one in found["listeners"]], found.get("worker"))
        for one in (*inherited.listeners, *([] if inherited.worker is None else [inherited.worker])):
            os.set_inheritable(one, False)
    except (ValueError, KeyError, TypeError, OSError):
        return Inherited()  # the addresses are opened anew
    return inherited


def hand_over(listeners: Sequence[int], worker: int | None) -> dict[str, str]:
    """Let descriptors live on in the program that this process becomes; the variables that say so."""
    import json

    for one in (*listeners, *([] if worker is None else [worker])):
        os.set_inheritable(one, True)
    return {SOCKETS: json.dumps({"listeners": list(listeners), "worker": worker})}


class OldWorker:
    """The worker of the version before: it answers, and is asked nothing any more.

    Args:
        sock: our end of its stream.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)

    def drain(self) -> None:
        """Take what it says and forget it, so that it never waits to say more."""
        try:
            while self._sock.recv(65_536):
                pass
        except OSError:
            return

    def end(self) -> None:
        """It takes no new requests, answers those that have begun, and ends."""
        import socket

        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # whoever else holds this stream
        except OSError:
            pass
        finally:
            self._sock.close()
