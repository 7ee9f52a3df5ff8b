"""Samples as the supervisor has them: what is kept, and what is sent when the server asks. Called by its main loop.

Three have to agree before anything is kept: the device's configuration (`samples`), the server, for the model and the
device's profile, and the model, which has to be a classifier that was not sure.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.protocol.delivery import Waiting
from agent.protocol.messages import DesiredState
from agent.protocol.samples import (
    SampleAck,
    SamplePiece,
    SampleRequest,
    SamplesReport,
    Sampling,
    UploadPhase,
    UploadReport,
)
from agent.samples.archive import Bounds, Packed, pack
from agent.samples.keeping import KeptSamples
from agent.samples.sample import Sample
from agent.samples.sending import PIECE, Sending
from agent.samples.uploads import OrderBook
from agent.update.pace import Pacer

log = logging.getLogger("agent")
EXPIRE_EVERY_S = 60.0
FOLDER, ORDERS = "samples", "samples.json"


@dataclass(frozen=True)
class SampleConfig:
    """What the configuration says: whether anything may be kept, and how many MiB of it."""

    allow: bool = False
    max_mb: float = 64.0


@dataclass
class _Upload:
    request: SampleRequest
    sending: Sending | None = None  # None while it is packed
    waiting: Waiting | None = None
    result: list[Packed | OSError | None] = field(default_factory=list)  # of the thread that packs


class Collecting:
    """What is kept and sent.

    Args:
        state_dir: of the agent.
        config: of the device's owner.
        floor_bytes: what samples must leave free on the disk.
        pacer: rates and budgets.
        send: says a piece to the server.
        tell_worker: what the worker is to choose from.
        changed: something is to be reported.
    """

    def __init__(
        self,
        state_dir: Path,
        config: SampleConfig,
        *,
        floor_bytes: int,
        pacer: Pacer,
        send: Callable[[SamplePiece], None],
        tell_worker: Callable[[tuple[Sampling, ...]], None],
        changed: Callable[[], None],
    ) -> None:
        self._allowed = config.allow
        self._pacer = pacer
        self._send = send
        self._tell_worker = tell_worker
        self._changed = changed
        self._kept = KeptSamples(state_dir / FOLDER, most_bytes=int(config.max_mb * 2**20), floor_bytes=floor_bytes)
        self._book = OrderBook(state_dir / ORDERS)
        self._upload: _Upload | None = None
        self._expire_at = 0.0
        self._kept.open({one.model: one for one in self._sampling})

    @property
    def _sampling(self) -> tuple[Sampling, ...]:
        return self._book.orders.sampling if self._allowed else ()

    @property
    def report(self) -> SamplesReport:
        """What the server is told."""
        models = tuple(sorted(one.model for one in self._sampling))
        uploads = tuple(self._report_of(one) for one in self._book.orders.requests)
        return SamplesReport(self._allowed, models, self._kept.count, self._kept.bytes, uploads)

    def desired(self, state: DesiredState) -> None:
        """The server wants this.

        Raises:
            OSError: when it can't be written; it holds all the same until the agent ends.
        """
        before = self._sampling
        try:
            self._book.want(state.sampling, state.sample_requests)
        finally:
            if self._sampling != before:
                self._kept.want({one.model: one for one in self._sampling})
                self._tell_worker(self._sampling)
            if self._upload is not None:
                self._upload = self._renewed(self._upload)

    def _renewed(self, upload: _Upload) -> _Upload | None:
        """An upload as the server wants it now, which may be faster or slower; None when it is wanted no more."""
        wanted = {one.upload_id: one for one in self._book.orders.requests}.get(upload.request.upload_id)
        if wanted is None or wanted.model not in {one.model for one in self._sampling}:
            return None
        upload.request = wanted
        return upload

    def worker_ready(self) -> None:
        """A fresh worker knows nothing."""
        if self._sampling:
            self._tell_worker(self._sampling)

    def sampled(self, samples: tuple[Sample, ...]) -> None:
        """The worker chose these.

        Raises:
            OSError: when one can't be written.
        """
        self._kept.add(samples)

    def drop_lowest(self) -> bool:
        """The disk is short: let one go; false when there is none."""
        return self._kept.drop_lowest()

    def link_up(self) -> None:
        """The connection is a new one."""
        if self._upload is not None and self._upload.sending is not None:
            self._upload.sending.link_up()

    def acknowledged(self, ack: SampleAck, now: float) -> None:
        """The server has so much of an upload."""
        upload = self._upload
        if upload is None or upload.sending is None or upload.request.upload_id != ack.upload_id:
            return
        packed = self._book.orders.packed[ack.upload_id]
        if ack.refused:
            self._end(upload.request, UploadPhase.FAILED, "refused", f"the server refused it: {ack.refused}")
        elif ack.digest == packed.digest and ack.stored:
            self._kept.forget(packed.names)
            self._end(upload.request, UploadPhase.DONE, samples=len(packed.names), size=packed.size)
        elif ack.digest == packed.digest:
            upload.sending.acknowledged(ack.received, now)
            self._go_on(upload, now)

    @property
    def busy(self) -> bool:
        """Whether samples are packed or sent."""
        return self._upload is not None

    def tick(self, now: float, *, connected: bool) -> None:
        """Go on with what is asked for; remove what is too old.

        Raises:
            OSError: when a file can't be read or written.
        """
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            self._kept.expire(time.time())
        if self._upload is None:
            request = self._book.next()
            if request is not None:
                self._begin(request)
        elif self._upload.sending is None:
            self._take_packed(self._upload)
        elif connected:
            self._go_on(self._upload, now)

    # -- one upload

    def _begin(self, request: SampleRequest) -> None:
        if not self._allowed:
            detail = "this device's configuration keeps no samples: set samples.allow = true there"
            self._end(request, UploadPhase.FAILED, "not_allowed", detail)
            return
        if request.model not in {one.model for one in self._sampling}:
            detail = f"no samples of {request.model} are kept here: turn them on for the device's profile"
            self._end(request, UploadPhase.FAILED, "off", detail)
            return
        packed = self._book.orders.packed.get(request.upload_id)
        path = self._book.archive(request.upload_id)
        if packed is not None and path.is_file() and path.stat().st_size == packed.size:
            self._upload = _Upload(request, Sending(packed.size))
            return
        kept, upload = self._kept.of(request.model), _Upload(request)

        def work() -> None:
            try:
                upload.result.append(pack(kept, path, Bounds(request.samples, request.bytes)))
            except OSError as error:
                upload.result.append(error)
            if self._upload is not upload:  # nobody asks for it any more
                path.unlink(missing_ok=True)

        self._upload = upload
        threading.Thread(target=work, name="samples", daemon=True).start()

    def _take_packed(self, upload: _Upload) -> None:
        if not upload.result:
            return
        (found,) = upload.result
        if isinstance(found, OSError):
            detail = f"the file that was to be sent can't be written: {found.strerror}: free some space, ask again"
            self._end(upload.request, UploadPhase.FAILED, "store_error", detail)
        elif found is None:
            detail = "none is kept now: no classification of it was so unsure since the last were sent"
            self._end(upload.request, UploadPhase.DONE, "none_kept", detail)
        else:
            self._book.packed(upload.request.upload_id, found)
            upload.sending = Sending(found.size)
            self._changed()

    def _go_on(self, upload: _Upload, now: float) -> None:
        assert upload.sending is not None
        allowance = self._pacer.download(upload.request.delivery, PIECE, now)
        waiting = allowance if isinstance(allowance, Waiting) else None
        if waiting != upload.waiting:
            upload.waiting = waiting
            self._changed()
        if isinstance(allowance, Waiting):
            return
        due = upload.sending.due(allowance.window, now)
        if not due:
            return
        packed = self._book.orders.packed[upload.request.upload_id]
        try:
            with self._book.archive(upload.request.upload_id).open("rb") as file:
                pieces = [(offset, os.pread(file.fileno(), length, offset)) for offset, length in due]
        except OSError as error:
            detail = f"the file that was being sent can't be read: {error.strerror}: ask again"
            self._end(upload.request, UploadPhase.FAILED, "store_error", detail)
            return
        for offset, data in pieces:
            self._pacer.received(len(data), now)
            self._send(SamplePiece(upload.request.upload_id, packed.digest, packed.size, offset, data))

    def _end(
        self,
        request: SampleRequest,
        phase: UploadPhase,
        reason: str = "",
        detail: str = "",
        *,
        samples: int = 0,
        size: int = 0,
    ) -> None:
        self._upload = None
        self._changed()
        self._book.end(UploadReport(request.upload_id, phase, samples, size, size, reason, detail))

    def _report_of(self, request: SampleRequest) -> UploadReport:
        orders, upload = self._book.orders, self._upload
        ended = orders.ended.get(request.upload_id)
        if ended is not None:
            return ended
        packed = orders.packed.get(request.upload_id)
        if packed is None:
            return UploadReport(request.upload_id, UploadPhase.PENDING)
        known = UploadReport(request.upload_id, UploadPhase.SENDING, len(packed.names), packed.size)
        if upload is None or upload.sending is None or upload.request.upload_id != request.upload_id:
            return known
        return msgspec.structs.replace(known, sent_bytes=upload.sending.received, waiting=upload.waiting)
