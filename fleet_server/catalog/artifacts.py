"""The artifact store: bytes by their SHA-256, in a folder or a bucket. It knows no database.

A file appears under its digest only when it is whole: obstore's folder store writes beside and renames, buckets do the
same by nature.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import obstore
from obstore.store import LocalStore, from_url

from agent.protocol.topics import check_digest
from fleet_server.errors import UnavailableError

PIECE = 1 << 20


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 (lower-case hexadecimal) and size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size


class ArtifactStore:
    """Content-addressed bytes. Thread-safe."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str | None, *, folder: Path) -> ArtifactStore:
        """The store at a URL (`file://`, `s3://`, `gs://`, `az://`), or in `folder` when there is none."""
        if url is None:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(folder))
        return cls(from_url(url))

    def put_file(self, path: Path) -> tuple[str, int]:
        """Store a file's bytes; what is there already stays. Returns digest and size."""
        digest, size = file_digest(path)
        if not self.exists(digest):
            self._store_call(obstore.put, _key(digest), path)
        return digest, size

    def fetch_to(self, digest: str, path: Path) -> None:
        """Write an object to a file, checking its digest.

        Raises:
            UnavailableError: when it is not there, or its bytes are not those of its name.
        """
        seen = hashlib.sha256()
        with path.open("wb") as file:
            for piece in self._store_call(obstore.get, _key(digest)).stream(PIECE):
                seen.update(piece)
                file.write(piece)
        if seen.hexdigest() != digest:
            path.unlink()
            raise UnavailableError("artifact_damaged", f"the store's copy of {digest} has other bytes: push it again")

    def stream(self, digest: str) -> Any:
        """An iterator of the object's bytes."""
        return self._store_call(obstore.get, _key(digest)).stream(PIECE)

    def read_range(self, digest: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end of the object."""
        return bytes(self._store_call(obstore.get_range, _key(digest), start=start, length=length))

    def exists(self, digest: str) -> bool:
        """Whether the object is there."""
        try:
            obstore.head(self._store, _key(digest))
        except FileNotFoundError:
            return False
        return True

    def delete(self, digest: str) -> None:
        """Remove an object; one that is not there is fine."""
        if self.exists(digest):
            self._store_call(obstore.delete, _key(digest))

    def check(self) -> None:
        """Prove that the store answers."""
        self.exists("0" * 64)

    def _store_call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return function(self._store, *arguments, **options)
        except FileNotFoundError:
            raise UnavailableError("artifact_missing", f"the artifact store has no {arguments[0]}") from None
        except OSError as error:
            raise UnavailableError("artifact_store", f"the artifact store failed: {error}") from error


def _key(digest: str) -> str:
    return f"{check_digest(digest)[:2]}/{digest}"
