"""What a simulated device keeps of unsure answers, and sends when it is asked: real files of made-up rows. Pure.

Only how many it keeps is remembered; the rows are drawn when a file is made, the same with every run of a seed.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from agent.protocol.commands import plain
from agent.protocol.datatypes import ARRAY_TYPES
from agent.protocol.manifest import Manifest, TensorSpec
from agent.protocol.messages import DesiredState, ModelWindow
from agent.protocol.samples import (
    LISTING,
    SampleAck,
    SampleLine,
    SamplePiece,
    SampleRequest,
    SamplesReport,
    Sampling,
    TensorLine,
    UploadPhase,
    UploadReport,
)
from agent.protocol.sketch import CONFIDENCE_BINS
from agent.samples.archive import OVERHEAD, npy
from agent.samples.sample import SampleTensor
from agent.samples.sending import Sending
from fleet_server.simulator.behaviours import SampleConduct

PIECES = 4
_NAMES = {np.dtype(kind).name: name for name, kind in ARRAY_TYPES.items()}


@dataclass
class _Upload:
    request: SampleRequest
    content: bytes
    digest: str
    rows: int
    sending: Sending


class Samples:
    """The samples of one device.

    Args:
        conduct: what its owner allows.
        manifest_of: of the version of a model that answers; None where none does.
        chance: a stream of chance for so manieth upload.
        send: says a piece.
        changed: something is to be reported.
    """

    def __init__(
        self,
        conduct: SampleConduct,
        manifest_of: Callable[[str], Manifest | None],
        chance: Callable[[int], np.random.Generator],
        *,
        send: Callable[[SamplePiece], None],
        changed: Callable[[], None],
    ) -> None:
        self._conduct, self._manifest_of, self._chance = conduct, manifest_of, chance
        self._send, self._changed = send, changed
        self._sampling: dict[str, Sampling] = {}
        self._requests: tuple[SampleRequest, ...] = ()
        self._kept: dict[str, int] = {}
        self._ended: dict[str, UploadReport] = {}
        self._upload: _Upload | None = None
        self._made = 0

    @property
    def busy(self) -> bool:
        """Whether something is asked for that is not over."""
        return any(one.upload_id not in self._ended for one in self._requests)

    @property
    def report(self) -> SamplesReport:
        """What the server is told."""
        kept = sum(self._kept.values())
        uploads = tuple(self._report_of(one) for one in self._requests)
        size = sum(count * self._row_bytes(model) for model, count in self._kept.items())
        return SamplesReport(self._conduct.allow, tuple(sorted(self._sampling)), kept, size, uploads)

    def desired(self, state: DesiredState) -> None:
        """The server wants this kept, and this sent."""
        self._sampling = {one.model: one for one in state.sampling} if self._conduct.allow else {}
        self._kept = {model: self._kept.get(model, 0) for model in self._sampling}
        self._requests = state.sample_requests
        listed = {one.upload_id for one in self._requests}
        self._ended = {key: one for key, one in self._ended.items() if key in listed}
        if self._upload is not None and self._upload.request.upload_id not in listed:
            self._upload = None

    def saw(self, windows: Sequence[ModelWindow]) -> None:
        """Its models answered: of what was unsure, some is kept."""
        for one in windows:
            wanted = self._sampling.get(one.model)
            if wanted is None:
                continue
            below = wanted.below * CONFIDENCE_BINS
            unsure = sum(count for bin_, count in one.confidence.items() if bin_ < below)
            most = min(wanted.samples, wanted.bytes // max(self._row_bytes(one.model), 1))
            self._kept[one.model] = min(most, self._kept[one.model] + unsure)

    def link_up(self) -> None:
        """The connection is a new one."""
        if self._upload is not None:
            self._upload.sending.link_up()

    def acknowledged(self, ack: SampleAck, now: float) -> None:
        """The server has so much of an upload."""
        upload = self._upload
        if upload is None or upload.request.upload_id != ack.upload_id:
            return
        if ack.refused:
            self._end(upload.request, UploadPhase.FAILED, "refused", f"the server refused it: {plain(ack.refused)}")
        elif ack.digest == upload.digest and ack.stored:
            model = upload.request.model
            self._kept[model] = max(0, self._kept.get(model, 0) - upload.rows)
            self._end(upload.request, UploadPhase.DONE, rows=upload.rows, size=len(upload.content))
        elif ack.digest == upload.digest:
            upload.sending.acknowledged(ack.received, now)
            self._go_on(upload, now)

    def tick(self, now: float, wall: float) -> None:
        """Go on with what is asked for; `now` true, `wall` by the device's clock, in Unix seconds."""
        if self._upload is not None:
            self._go_on(self._upload, now)
            return
        for request in self._requests:
            if request.upload_id not in self._ended:
                self._begin(request, wall)
                return

    def _begin(self, request: SampleRequest, wall: float) -> None:
        manifest = self._manifest_of(request.model)
        if not self._conduct.allow:
            detail = "this device's configuration keeps no samples: set samples.allow = true there"
            self._end(request, UploadPhase.FAILED, "not_allowed", detail)
        elif request.model not in self._sampling:
            detail = f"no samples of {request.model} are kept here: turn them on for the device's profile"
            self._end(request, UploadPhase.FAILED, "off", detail)
        else:
            self._made += 1
            chance = self._chance(self._made)
            rows = min(self._kept[request.model], request.samples)
            if manifest is not None:
                rows = min(rows, request.bytes // self._row_bytes(request.model))
            if chance.random() < self._conduct.fails:
                detail = "it failed: the simulation's behaviours say so (samples.fails)"
                self._end(request, UploadPhase.FAILED, "store_error", detail)
            elif manifest is None or not rows:
                detail = "none is kept now: no classification of it was so unsure since the last were sent"
                self._end(request, UploadPhase.DONE, "none_kept", detail)
            else:
                below = self._sampling[request.model].below
                content = _packed(manifest, rows, below, wall, chance)
                digest = hashlib.sha256(content).hexdigest()
                self._upload = _Upload(request, content, digest, rows, Sending(len(content)))
        self._changed()

    def _go_on(self, upload: _Upload, now: float) -> None:
        key, size = upload.request.upload_id, len(upload.content)
        for offset, length in upload.sending.due(PIECES, now):
            self._send(SamplePiece(key, upload.digest, size, offset, upload.content[offset : offset + length]))

    def _end(
        self,
        request: SampleRequest,
        phase: UploadPhase,
        reason: str = "",
        detail: str = "",
        rows: int = 0,
        size: int = 0,
    ) -> None:
        self._upload = None
        self._ended[request.upload_id] = UploadReport(request.upload_id, phase, rows, size, size, reason, detail)
        self._changed()

    def _report_of(self, request: SampleRequest) -> UploadReport:
        ended = self._ended.get(request.upload_id)
        if ended is not None:
            return ended
        upload = self._upload
        if upload is None or upload.request.upload_id != request.upload_id:
            return UploadReport(request.upload_id, UploadPhase.PENDING)
        size, sent = len(upload.content), upload.sending.received
        return UploadReport(request.upload_id, UploadPhase.SENDING, upload.rows, size, sent)

    def _row_bytes(self, model: str) -> int:
        manifest = self._manifest_of(model)
        tensors = (*manifest.inputs, *manifest.outputs) if manifest else ()
        return OVERHEAD * (1 + len(tensors)) + sum(
            math.prod(_shape(one)) * np.dtype(_kind(one)).itemsize for one in tensors
        )


def _packed(manifest: Manifest, rows: int, below: float, wall: float, chance: np.random.Generator) -> bytes:
    """A file of samples, the least sure first."""
    sure = np.sort(chance.uniform(0.1 * below, below, size=rows))
    lines = []
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, confidence in enumerate(sure.tolist()):
            listed = []
            for side, specs in (("in", manifest.inputs), ("out", manifest.outputs)):
                tensors = [_tensor(one, chance) for one in specs]
                for one in tensors:
                    archive.writestr(f"{number}/{side}/{one.name}.npy", npy(one))
                listed.append(tuple(TensorLine(one.name, one.datatype, one.shape) for one in tensors))
            at = wall - float(chance.uniform(0.0, 60.0))
            lines.append(SampleLine(manifest.model, manifest.version, manifest.digest, at, confidence, *listed))
        archive.writestr(LISTING, msgspec.json.encode(lines))
    return content.getvalue()


def _tensor(spec: TensorSpec, chance: np.random.Generator) -> SampleTensor:
    values = chance.standard_normal(_shape(spec)).astype(_kind(spec))
    return SampleTensor(spec.name, _NAMES[np.dtype(_kind(spec)).name], values.shape, values.tobytes())


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Of one row: an axis of any length has one."""
    return tuple(max(size, 1) for size in spec.shape)


def _kind(spec: TensorSpec) -> str:
    """What numpy calls its numbers; texts become bytes."""
    try:
        name = np.dtype(spec.dtype).newbyteorder("<").str
    except TypeError:
        return "|u1"
    return name if name in ARRAY_TYPES.values() else "|u1"
