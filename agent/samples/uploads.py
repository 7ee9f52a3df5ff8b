"""What became of requests for samples, kept on the disk: what is asked for, what is packed, and how it ended.

It knows no network. The file is written before anything of it is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.files import remove_durably, write_durably
from agent.protocol.samples import SampleRequest, Sampling, UploadPhase, UploadReport
from agent.samples.archive import Packed

ENDED = frozenset({UploadPhase.DONE, UploadPhase.FAILED})


class Orders(msgspec.Struct):
    """What the server wants, and what came of it, by the id of the upload."""

    sampling: tuple[Sampling, ...] = ()
    requests: tuple[SampleRequest, ...] = ()
    packed: dict[str, Packed] = {}
    ended: dict[str, UploadReport] = {}


class OrderBook:
    """The file of orders. One that can't be read is as none: the server says again what it wants.

    Args:
        path: of the file; the files that are sent lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.orders = msgspec.json.decode(path.read_bytes(), type=Orders)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            self.orders = Orders()
        self._remove_strangers()

    def archive(self, upload_id: str) -> Path:
        """Where the file lies that is sent."""
        return self._path.with_name(f"samples-{upload_id}.npz")

    def want(self, sampling: Sequence[Sampling], requests: Sequence[SampleRequest]) -> None:
        """The server wants this from now on; what came of other requests is forgotten.

        Raises:
            OSError: when it can't be written; it holds all the same until the agent ends.
        """
        listed = {one.upload_id for one in requests}
        before = msgspec.json.encode(self.orders)
        self.orders = Orders(
            tuple(sampling),
            tuple(requests),
            {key: one for key, one in self.orders.packed.items() if key in listed},
            {key: one for key, one in self.orders.ended.items() if key in listed},
        )
        self._remove_strangers()
        if msgspec.json.encode(self.orders) != before:
            self._write()

    def packed(self, upload_id: str, packed: Packed) -> None:
        """An upload's file is there.

        Raises:
            OSError: when it can't be written.
        """
        self.orders.packed[upload_id] = packed
        self._write()

    def end(self, report: UploadReport) -> None:
        """An upload is over, and its file goes.

        Raises:
            OSError: when it can't be written; it holds all the same until the agent ends.
        """
        self.orders.ended[report.upload_id] = report
        self.orders.packed.pop(report.upload_id, None)
        self._remove_strangers()
        self._write()

    def next(self) -> SampleRequest | None:
        """The first request that is not over."""
        return next((one for one in self.orders.requests if one.upload_id not in self.orders.ended), None)

    def _write(self) -> None:
        if self.orders == Orders():
            remove_durably(self._path)
        else:
            write_durably(self._path, msgspec.json.encode(self.orders))

    def _remove_strangers(self) -> None:
        """Files that belong to no upload; one that is being packed has another ending."""
        wanted = {self.archive(one).name for one in self.orders.packed}
        for path in self._path.parent.glob("samples-*.npz"):
            if path.name not in wanted:
                with contextlib.suppress(OSError):
                    path.unlink()
