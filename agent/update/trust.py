"""What the device believes: a TUF client over whatever fetches metadata (python-tuf does the verifying).

It follows the client workflow of the TUF specification (theupdateframework.github.io/specification, section 5), and
adds what a device needs: time that never goes back, a bounded grace for bad clocks, files that survive a power cut, and
a root version that never falls, also when a local file was lost. It imports python-tuf and cryptography (13 MB), so
only the short-lived process `agent.update.trust_process` loads it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from agent.files import remove_leftovers, storage_code, write_durably
from agent.protocol.errors import WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import SIGNED_AT
from agent.protocol.messages import TrustPiece

BASE_URL = "fleet:/"
FIRST_ROOT = "first-root"  # what was trusted first, where no file was configured
PROVEN = "proven"
NO_ROOT = (
    "this device has no trusted root, and its broker is on another machine: enrol it (shoal-agent enroll), or save a "
    "root with `shoal trust root` and name the file as root_file in the agent's configuration"
)


class TrustError(Exception):
    """Metadata or a target is refused.

    Attributes:
        code: `untrusted`, `unsigned`, `metadata_expired`, `no_trusted_root`, `disk_full` or `store_error`.
        detail: a sentence for people.
    """

    def __init__(self, code: WireErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class UnavailableError(Exception):
    """Metadata could not be had now: nothing is wrong with it, and it is worth trying again."""


class Proven(msgspec.Struct, frozen=True):
    """What was proven once, and must not be undone.

    Attributes:
        root: the highest root version that was trusted.
        timestamp: the highest version of the timestamp, of those under that root.
        at: Unix seconds that have passed for sure.
    """

    root: int = 0
    timestamp: int = 0
    at: float = 0.0


class PieceFetcher(FetcherInterface):
    """Fetches files piece by piece.

    Args:
        ask: gives a piece of a file, by name and offset.
    """

    def __init__(self, ask: Callable[[str, int], TrustPiece]) -> None:
        self._ask = ask

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(BASE_URL)
        offset, total = 0, None
        while total is None or offset < total:
            piece = self._ask(name, offset)
            if piece.absent:
                raise exceptions.DownloadHTTPError(f"there is no {name}", 404)
            if (piece.file, piece.offset) != (name, offset) or not piece.data or total not in {None, piece.total}:
                raise exceptions.DownloadError(f"the pieces of {name} do not fit together")
            total, offset = piece.total, offset + len(piece.data)
            yield piece.data


class _DurableUpdater(Updater):
    """python-tuf's updater at a time of our choosing; what it has come to trust can be read, and survives power cuts.

    python-tuf renames files into place and syncs neither them nor their folder: its one writing function is replaced.
    """

    def __init__(self, folder: Path, url: str, root: bytes, fetcher: FetcherInterface | None, at: dt.datetime) -> None:
        config = UpdaterConfig(targets_max_length=LIMITS.trust_file_bytes)
        super().__init__(str(folder), url, fetcher=fetcher, config=config, bootstrap=root)
        self._trusted_set.reference_time = at

    def _persist_file(self, filename: str, data: bytes) -> None:
        write_durably(Path(filename), data)

    def trusted(self) -> tuple[Root, Timestamp | None]:
        """The root, and the timestamp if one was accepted."""
        known = self._trusted_set
        return known.root, known.timestamp if Timestamp.type in known else None


class TrustClient:
    """The metadata that a device trusts, below a folder, and what it says of a target.

    Args:
        folder: kept between uses; one client at a time.
        root: trusted root metadata that was configured; None to go on with what was trusted first.
        fetcher: of metadata; None for python-tuf's own over HTTP.
        url: of the metadata.
        first_use: trust the root that comes first, where none is known.
        grace_s: how long, in seconds, metadata counts after it has expired.
        clock: Unix seconds.

    Raises:
        TrustError: where there is no root to trust.
        UnavailableError: when the first root did not come.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes | None,
        fetcher: FetcherInterface | None,
        *,
        url: str = BASE_URL,
        first_use: bool = False,
        grace_s: float = 0.0,
        clock: Callable[[], float] = lambda: dt.datetime.now(dt.UTC).timestamp(),
    ) -> None:
        self._folder = folder
        self._clock = clock
        with self._judging():
            folder.mkdir(parents=True, exist_ok=True)
        for one in (folder, folder / "root_history"):
            remove_leftovers(one)
        self._proven = self._read_proven()
        anchor = root or self._known_root() or self._first_root(fetcher, first_use=first_use)
        at = max(clock(), self._proven.at) - grace_s
        with self._judging():
            self.updater = _DurableUpdater(folder, url, anchor, fetcher, dt.datetime.fromtimestamp(at, dt.UTC))

    def refresh(self) -> None:
        """Bring the top-level metadata up to date; once a client.

        Raises:
            TrustError: when what came is not to be trusted, or is older than what was trusted before.
            UnavailableError: when it did not come.
        """
        with self._judging():
            self.updater.refresh()
            self._check_floor()
            self._keep_proven()

    def target(self, path: str) -> TargetFile | None:
        """What trusted metadata says of a target; None when it says nothing.

        Raises:
            TrustError: when metadata of a delegated role is not to be trusted.
            UnavailableError: when it did not come.
        """
        with self._judging():
            return self.updater.get_targetinfo(path)

    def check(self, path: str, content: bytes) -> None:
        """Make sure that these bytes are the target of this path.

        Raises:
            TrustError: when they are not: `unsigned` or `untrusted`.
            UnavailableError: when metadata did not come.
        """
        target = self.target(path)
        if target is None:
            detail = (
                f"nobody has signed {path}: see what waits with `shoal trust status`, sign it with `shoal trust sign`"
            )
            raise TrustError(WireErrorCode.UNSIGNED, detail)
        with self._judging(path):
            target.verify_length_and_hashes(content)

    # -- the root

    def _known_root(self) -> bytes | None:
        """What was trusted first; where that file is damaged, the newest root of the chain that is whole."""
        history = self._folder / "root_history"
        later = sorted(history.glob("*.root.json"), key=_version_of, reverse=True) if history.is_dir() else []
        for path in (self._folder / FIRST_ROOT, *later):
            with contextlib.suppress(OSError, exceptions.RepositoryError, ValueError):
                data = path.read_bytes()
                _check_root(data)
                return data
        return None

    def _first_root(self, fetcher: FetcherInterface | None, *, first_use: bool) -> bytes:
        if not first_use or fetcher is None:
            raise TrustError(WireErrorCode.NO_TRUSTED_ROOT, NO_ROOT)
        with self._judging("the first root"):
            data = fetcher.download_bytes(f"{BASE_URL}1.root.json", UpdaterConfig().root_max_length)
            _check_root(data)
            write_durably(self._folder / FIRST_ROOT, data)
        return data

    # -- what never goes back

    def _read_proven(self) -> Proven:
        try:
            return msgspec.json.decode((self._folder / PROVEN).read_bytes(), type=Proven)
        except (OSError, msgspec.MsgspecError):
            return Proven()

    def _check_floor(self) -> None:
        root, timestamp = self.updater.trusted()
        if root.version < self._proven.root:
            detail = (
                f"root version {root.version} is older than {self._proven.root}, which this device has trusted before: "
                "the server, or somebody between, withholds the newer one"
            )
            raise TrustError(WireErrorCode.UNTRUSTED, detail)
        if root.version == self._proven.root and timestamp and timestamp.version < self._proven.timestamp:
            detail = f"timestamp version {timestamp.version} is older than {self._proven.timestamp}: it was rolled back"
            raise TrustError(WireErrorCode.UNTRUSTED, detail)

    def _keep_proven(self) -> None:
        root, timestamp = self.updater.trusted()
        assert timestamp is not None
        said = timestamp.unrecognized_fields.get(SIGNED_AT, 0.0)
        signed_at = float(said) if isinstance(said, int | float) else 0.0
        # The clock counts too: it lies before the expiry of what was accepted, so it can't be far ahead.
        at = max(self._proven.at, min(signed_at, timestamp.expires.timestamp()), self._accepted_at(timestamp))
        proven = Proven(root.version, timestamp.version, at)
        if proven != self._proven:
            self._proven = proven
            write_durably(self._folder / PROVEN, msgspec.json.encode(proven))

    def _accepted_at(self, timestamp: Timestamp) -> float:
        return min(self._clock(), timestamp.expires.timestamp())

    @contextlib.contextmanager
    def _judging(self, what: str = "the metadata") -> Iterator[None]:
        """python-tuf's errors as ours. Whatever else hostile bytes provoke in a parser is a refusal too."""
        try:
            yield
        except (TrustError, UnavailableError):
            raise
        except exceptions.DownloadLengthMismatchError as error:
            raise TrustError(WireErrorCode.UNTRUSTED, f"{what} is longer than it may be: {error}") from None
        except exceptions.DownloadError as error:
            raise UnavailableError(str(error.__cause__ or error)) from None
        except exceptions.ExpiredMetadataError as error:
            detail = (
                f"{error}: the server does not renew it, somebody holds it back, or this device's clock is wrong "
                f"(it says {dt.datetime.fromtimestamp(self._clock(), dt.UTC):%Y-%m-%d %H:%M} UTC)"
            )
            raise TrustError(WireErrorCode.METADATA_EXPIRED, detail) from None
        except exceptions.RepositoryError as error:
            raise TrustError(WireErrorCode.UNTRUSTED, f"{what} is not to be trusted: {error}") from None
        except OSError as error:
            detail = f"{self._folder} can't be written: {error.strerror}; free some space or mend the disk"
            raise TrustError(storage_code(error), detail) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TrustError(WireErrorCode.UNTRUSTED, f"{what} can't be read: {error}") from None


def _check_root(data: bytes) -> None:
    """Whether root metadata is signed by its own keys.

    Raises:
        RepositoryError: when it is not.
    """
    Metadata[Root].from_bytes(data).verify_delegate(Root.type, Metadata[Root].from_bytes(data))


def _version_of(path: Path) -> int:
    number = path.name.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() else 0
