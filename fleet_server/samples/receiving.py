"""Takes the pieces of devices' files of samples, in order, a transaction each; the last one makes the file.

Pieces are rows until then, so that whichever server gets the next one goes on. The file is in the artifact store before
the row says so: a server that dies in between is sent the last piece again, and stores the same bytes once more.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from pathlib import Path

from sqlalchemy.orm import Session

from agent.protocol.samples import SampleAck, SamplePiece
from fleet_server import audit
from fleet_server.catalog.artifacts import ArtifactStore, file_digest
from fleet_server.db import Database
from fleet_server.models import SamplePieceRow, SampleRequestRow, SampleUpload
from fleet_server.samples import repository, telling
from fleet_server.samples.examining import NoSamplesError, examine
from fleet_server.samples.schemas import UploadState


class Receiving:
    """Takes pieces.

    Args:
        database: where they are.
        store: where whole files go.
        folder: for files that are being made.
    """

    def __init__(self, database: Database, store: ArtifactStore, folder: Path) -> None:
        self._database = database
        self._store = store
        self._folder = folder

    def take(self, device_id: str, piece: SamplePiece, now: dt.datetime) -> SampleAck:
        """Take a piece; the answer says how far its file has come.

        Raises:
            UnavailableError: when the artifact store does not answer; the piece is not taken then.
        """
        with self._database.write() as session:
            upload = session.get(SampleUpload, piece.upload_id, with_for_update=True)
            if upload is None or upload.device_id != device_id or not upload.told:
                return SampleAck(piece.upload_id, piece.digest, 0, refused="nobody asks for it, or not any more")
            if upload.phase == UploadState.STORED.value:
                return SampleAck(upload.id, upload.digest or "", upload.size, stored=True)
            request = session.get_one(SampleRequestRow, upload.request_id)
            if piece.size > request.size:
                refused = f"it has {piece.size} bytes, and {request.size} were asked for"
                return self._refuse(session, upload, request, piece, refused, now)
            if (upload.digest, upload.size) != (piece.digest, piece.size):  # the first one, or it was packed anew
                repository.forget_pieces(session, upload.id)
                upload.digest, upload.size, upload.received = piece.digest, piece.size, 0
            if piece.offset == upload.received:
                session.add(SamplePieceRow(upload_id=upload.id, offset=piece.offset, data=piece.data))
                upload.received += len(piece.data)
                upload.phase = UploadState.SENDING.value
            if upload.received < upload.size:
                return SampleAck(upload.id, piece.digest, upload.received)
            session.flush()
            try:
                self._keep(session, upload, request, now)
            except NoSamplesError as error:
                return self._refuse(session, upload, request, piece, str(error), now)
            return SampleAck(upload.id, piece.digest, upload.size, stored=True)

    def _keep(self, session: Session, upload: SampleUpload, request: SampleRequestRow, now: dt.datetime) -> None:
        with tempfile.TemporaryDirectory(prefix="samples-", dir=self._folder) as folder:
            path = Path(folder) / "samples.npz"
            with path.open("wb") as file:
                for data in repository.pieces_of(session, upload.id):
                    file.write(data)
            digest, size = file_digest(path)
            if (digest, size) != (upload.digest, upload.size):
                raise NoSamplesError("its bytes have another digest than the device said")
            upload.listing = examine(path, request.model)
            self._store.put_file(path)
        repository.forget_pieces(session, upload.id)
        upload.samples, upload.stored_at, upload.finished_at = len(upload.listing), now, now
        upload.phase, upload.waiting = UploadState.STORED.value, None
        detail = {"request": request.id, "samples": upload.samples, "digest": digest, "bytes": size}
        audit.record(
            session, fleet_id=upload.fleet_id, actor=upload.device_id, action="samples.store",
            subject=f"sample-set/{upload.id}", detail=detail,
        )  # fmt: skip
        telling.upload_ended(session, upload, request)
        telling.finish_when_complete(session, request, now)

    def _refuse(
        self,
        session: Session,
        upload: SampleUpload,
        request: SampleRequestRow,
        piece: SamplePiece,
        refused: str,
        now: dt.datetime,
    ) -> SampleAck:
        telling.end(session, upload, UploadState.FAILED, "refused", f"what the device sent is refused: {refused}", now)
        telling.upload_ended(session, upload, request)
        telling.finish_when_complete(session, request, now)
        return SampleAck(piece.upload_id, piece.digest, 0, refused=refused)
