"""The artifact store: bytes by their SHA-256, in a folder or a bucket. It knows no database.

A file appears under its digest only when it is whole: obstore's folder store writes beside and renames, buckets do the
same by nature.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from agent.protocol.topics import check_digest
from fleet_server.errors import UnavailableError

log = logging.getLogger(__name__)
PIECE = 1 << 20
DERIVED = "cache"
MISSING = "artifact_missing"


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 (lower-case hexadecimal) and size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size


class ArtifactStore:
    """Content-addressed bytes. Thread-safe.

    Args:
        store: obstore's.
        below: a path of it; empty for its top.
    """

    def __init__(self, store: Any, below: str = "") -> None:
        self._store = store
        self._below = below

    @classmethod
    def open(cls, url: str | None, *, folder: Path, must_exist: bool = False) -> ArtifactStore:
        """The store at a URL (`file://`, `s3://`, `gs://`, `az://`), or in `folder` when there is none.

        Raises:
            UnavailableError: when it can't be opened, or `must_exist` and its folder is not there.
        """
        if must_exist and url is not None and url.startswith("file://"):
            path = Path(unquote(urlsplit(url).path))
            if not path.is_dir():
                raise UnavailableError("artifact_store", f"there is no folder {path} on this machine")
        if url is None:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(folder))
        try:
            return cls(from_url(url))
        except BaseError as error:
            detail = f"SHOAL_ARTIFACTS_URL can't be opened: {str(error).splitlines()[0][:300]}"
            raise UnavailableError("artifact_store", detail) from None

    def put_file(self, path: Path) -> tuple[str, int]:
        """Store a file's bytes; what is there already stays. Returns digest and size."""
        digest, size = file_digest(path)
        if not self.exists(digest):
            self._store_call(obstore.put, self._key(digest), path)
        return digest, size

    def fetch_to(self, digest: str, path: Path) -> None:
        """Write an object to a file, checking its digest.

        Raises:
            UnavailableError: when it is not there, or its bytes are not those of its name.
        """
        seen = hashlib.sha256()
        with path.open("wb") as file:
            for piece in self._store_call(obstore.get, self._key(digest)).stream(PIECE):
                seen.update(piece)
                file.write(piece)
        if seen.hexdigest() != digest:
            path.unlink()
            raise UnavailableError("artifact_damaged", f"the store's copy of {digest} has other bytes: push it again")

    def stream(self, digest: str) -> Any:
        """An iterator of the object's bytes."""
        return self._store_call(obstore.get, self._key(digest)).stream(PIECE)

    def stream_range(self, digest: str, start: int, length: int) -> Any:
        """An iterator of `length` bytes from `start`."""
        options = {"range": (start, start + length)}
        return self._store_call(obstore.get, self._key(digest), options=options).stream(PIECE)

    def read_range(self, digest: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end of the object."""
        return bytes(self._store_call(obstore.get_range, self._key(digest), start=start, length=length))

    def exists(self, digest: str) -> bool:
        """Whether the object is there."""
        try:
            obstore.head(self._store, self._key(digest))
        except FileNotFoundError:
            return False
        return True

    def delete(self, digest: str) -> None:
        """Remove an object and what was derived of it; one that is not there is fine."""
        if self.exists(digest):
            self._store_call(obstore.delete, self._key(digest))
        derived = self.derived(digest)
        derived.delete(derived.entries())

    def derived(self, digest: str) -> StoreFolder:
        """Files that can be made again of an object: they go with it."""
        return self.folder(f"{self._below}{DERIVED}/{check_digest(digest)}")

    def folder(self, path: str) -> StoreFolder:
        """Files by name below a path of the store, beside the content-addressed ones."""
        return StoreFolder(self._store, path)

    def below(self, path: str) -> ArtifactStore:
        """Content-addressed bytes that share nothing with these: what is deleted here stays there."""
        return ArtifactStore(self._store, f"{path}/")

    def _key(self, digest: str) -> str:
        return f"{self._below}{check_digest(digest)[:2]}/{digest}"

    def check(self) -> None:
        """Prove that the store answers."""
        self.exists("0" * 64)

    def _store_call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        return _call(self._store, function, *arguments, **options)


@dataclass(frozen=True)
class StoreEntry:
    """A file below a path of the store: its bytes, and when it was written."""

    size: int
    written_at: dt.datetime


class StoreFolder:
    """Files by name below a path of the store. What is put under a name replaces what was there."""

    def __init__(self, store: Any, path: str) -> None:
        self._store = store
        self._path = path

    def put(self, path: Path) -> None:
        """Store a file under its own name."""
        _call(self._store, obstore.put, f"{self._path}/{path.name}", path)

    def folder(self, path: str) -> StoreFolder:
        """A folder below this one."""
        return StoreFolder(self._store, f"{self._path}/{path}")

    def fetch_to(self, name: str, path: Path) -> None:
        """Write what is stored under a name to a file.

        Raises:
            UnavailableError: when it is not there.
        """
        pieces = _call(self._store, obstore.get, f"{self._path}/{name}").stream(PIECE)
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)

    def entries(self) -> dict[str, StoreEntry]:
        """What lies below this path, at any depth."""
        found = {}
        for batch in _call(self._store, obstore.list, prefix=self._path):
            for entry in batch:
                found[entry["path"][len(self._path) + 1 :]] = StoreEntry(entry["size"], entry["last_modified"])
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Remove some; those that are not there are fine."""
        for name in names:
            try:
                _call(self._store, obstore.delete, f"{self._path}/{name}")
            except UnavailableError as error:
                if error.code != MISSING:
                    raise


def _call(store: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(store, *arguments, **options)
    except (FileNotFoundError, NotFoundError):
        raise UnavailableError(MISSING, f"the artifact store has no {arguments[0]}") from None
    except (OSError, BaseError) as error:
        log.error("the artifact store failed: %s", error)  # noqa: TRY400 (its message says it all)
        detail = "the artifact store does not answer: try again soon; the server's log says more"
        raise UnavailableError("artifact_store", detail) from error
