"""Work in a forked process: a library that crashes on a stranger's net takes one recipe with it, not the build."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agent.parent import end_with_parent
from converters.errors import ConversionError

ResultT = TypeVar("ResultT")


def isolated(work: Callable[[], ResultT], folder: Path) -> ResultT:
    """What `work` gives or raises, in a process of its own.

    Args:
        work: what to do; what it gives or raises must be picklable.
        folder: for the answer's file.

    Raises:
        ConversionError: `tool_crashed` when the process ended without an answer; and what `work` raises.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        answer = Path(name) / "answer"
        with warnings.catch_warnings():
            # Python and JAX warn of forks beside threads: here those are idle, and the child asks nothing of them.
            warnings.simplefilter("ignore")
            parent = os.getpid()
            child = os.fork()
        if child == 0:
            _answer(work, answer, parent)
        _, status = os.waitpid(child, 0)
        if not answer.exists():
            ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
            detail = f"a library crashed on this net while the file was made or first run ({ended})"
            raise ConversionError("tool_crashed", detail)
        worked, given = pickle.loads(answer.read_bytes())  # noqa: S301 (written by our own child, in our own folder)
    if not worked:
        raise given
    result: ResultT = given
    return result


def _answer(work: Callable[[], object], answer: Path, parent: int) -> None:
    """The child's part: never returns, and runs nothing of what its parent would do at its end."""
    try:
        end_with_parent(parent)
        try:
            found: tuple[bool, object] = (True, work())
        except (ConversionError, MemoryError) as error:
            found = (False, error)
        except Exception as error:  # noqa: BLE001 (quantizers raise anything, not all of it picklable)
            found = (False, RuntimeError(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(OSError):
            part = answer.with_suffix(".part")
            part.write_bytes(pickle.dumps(found))
            part.replace(answer)
    finally:
        os._exit(0)
