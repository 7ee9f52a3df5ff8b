"""Processes of the agent's own that are told what to do over a socket they inherit: both ends of how they begin."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

from agent.parent import end_with_parent


def start_child(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a module that begins with `inherited_socket`; it, and the other end of its socket.

    Raises:
        OSError: when the system refuses a process.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", module, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
    try:
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL), ours
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()


def inherited_socket() -> socket.socket:
    """In such a process: its end of the socket. From now on it ends with who started it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args()
    end_with_parent(options.parent)
    return socket.socket(fileno=options.fd)


def end_child(process: subprocess.Popen[bytes], within_s: float) -> int:
    """The exit status of a process that was told to end; one that has not by then is killed."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
