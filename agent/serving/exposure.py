"""A version that runs beside the one that serves: which requests it is given, and what becomes of copies.

Copies of requests wait in a bounded queue for one thread of low priority. What does not fit is dropped and counted:
what is served never waits for a copy, and never fails for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import queue
import threading
from dataclasses import dataclass

from agent.protocol.messages import Exposure, ExposureMode
from agent.runtimes.base import Tensors
from agent.serving.comparison import disagreements
from agent.serving.models import LoadedModel

log = logging.getLogger(__name__)
WAITING = 32  # copies
WAITING_BYTES = 32 << 20
# Low, and not the lowest: between inferences the thread holds the interpreter, which what serves needs too.
NICE = 10


@dataclass
class _Copy:
    inputs: Tensors
    served: Tensors
    rows: int
    request_id: str
    size: int


class Beside:
    """One artifact that runs beside another. Its methods are called by the worker's main thread.

    Args:
        model: the artifact.
        exposure: what it is given.
    """

    def __init__(self, model: LoadedModel, exposure: Exposure) -> None:
        self.model = model
        self._exposure = exposure
        self._came = 0
        self._salt = model.manifest.digest.encode()
        self._shadow = _Shadow(model) if exposure.mode is ExposureMode.SHADOW else None

    def answers(self, request_id: str) -> bool:
        """Whether it is to answer a request."""
        return self._shadow is None and self._picks(request_id)

    def served(self, inputs: Tensors, outputs: Tensors, rows: int, request_id: str) -> None:
        """A request was answered by the other: it may get a copy."""
        if self._shadow is not None and self._picks(request_id):
            self._shadow.offer(inputs, outputs, rows, request_id)

    def end(self) -> None:
        """Give it nothing more; what waits is dropped."""
        if self._shadow is not None:
            self._shadow.end()

    def _picks(self, request_id: str) -> bool:
        """By the request's id, so that the same is answered by the same; those without one by turns."""
        share = self._exposure.share
        if request_id:
            digest = hashlib.blake2b(self._salt + request_id.encode(errors="replace"), digest_size=8).digest()
            return int.from_bytes(digest, "big") < share * 2.0**64
        self._came += 1
        return math.floor(self._came * share) > math.floor((self._came - 1) * share)


class _Shadow:
    """The queue and the thread."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._queue: queue.Queue[_Copy | None] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting = self._bytes = 0
        self._ended = False
        threading.Thread(target=self._loop, name=f"shadow-{model.manifest.digest[:8]}", daemon=True).start()

    def offer(self, inputs: Tensors, served: Tensors, rows: int, request_id: str) -> None:
        """Take a copy when there is room."""
        size = sum(one.nbytes for one in (*inputs.values(), *served.values()))
        with self._lock:
            full = self._waiting >= WAITING or self._bytes + size > WAITING_BYTES
            if not full:
                self._waiting += 1
                self._bytes += size
        if full:
            self._model.recorder.dropped()
        else:
            self._queue.put(_Copy(inputs, served, rows, request_id, size))

    def end(self) -> None:
        """Answer nothing more."""
        self._ended = True
        self._queue.put(None)

    def _loop(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (copy := self._queue.get()) is not None:
            with self._lock:
                self._waiting -= 1
                self._bytes -= copy.size
            if self._ended:
                self._model.recorder.dropped()
            else:
                self._answer(copy)

    def _answer(self, copy: _Copy) -> None:
        try:
            outputs = self._model.shadow(copy.inputs, copy.rows, copy.request_id)
            if outputs is not None:
                differ = disagreements(copy.served, outputs, copy.rows, self._model.allowed)
                self._model.recorder.compared(copy.rows, differ)
        except Exception:
            log.exception("a copy of a request could not be compared")
