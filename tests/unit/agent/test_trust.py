"""Attacks on what a device believes, made over the very messages that carry metadata."""

from __future__ import annotations

import datetime as dt
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from agent.protocol.codec import encode
from agent.protocol.errors import WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.messages import TrustPiece
from agent.update.trust import FIRST_ROOT, PROVEN, PieceFetcher, TrustClient, TrustError, UnavailableError
from tests.tuf_repository import TufRepository
from tests.unit.agent.test_updater import manifest

DAY = 86_400.0
ONE = manifest("a")
SIGNED = msgspec.json.encode(ONE)
PATH = ONE.target_path


@pytest.fixture
def repository() -> TufRepository:
    found = TufRepository()
    found.add("model.m", PATH, SIGNED)
    return found


def client(
    folder: Path, repository: TufRepository, *, days: float = 0.0, grace_s: float = 0.0, root: bytes | None = None
) -> TrustClient:
    """A device that trusts the repository's first root, `days` from now by its own clock."""
    return TrustClient(
        folder / "trust",
        root,
        PieceFetcher(repository.ask()),
        first_use=True,
        grace_s=grace_s,
        clock=lambda: time.time() + days * DAY,
    )


def verify(folder: Path, repository: TufRepository, path: str = PATH, content: bytes = SIGNED, **how: float) -> None:
    device = client(folder, repository, **how)  # type: ignore[arg-type]
    device.refresh()
    device.check(path, content)


def refusal(folder: Path, repository: TufRepository, path: str = PATH, content: bytes = SIGNED, **how: float):
    with pytest.raises(TrustError) as found:
        verify(folder, repository, path, content, **how)
    return found.value


def test_what_was_signed_is_trusted_and_files_that_are_known_are_not_fetched_again(
    tmp_path: Path, repository: TufRepository
) -> None:
    verify(tmp_path, repository)
    repository.asked.clear()
    verify(tmp_path, repository)
    assert repository.asked == ["2.root.json", "timestamp.json"]


def test_a_manifest_that_nobody_signed(tmp_path: Path, repository: TufRepository) -> None:
    other = manifest("b", version="2")
    found = refusal(tmp_path, repository, other.target_path, msgspec.json.encode(other))
    assert found.code is WireErrorCode.UNSIGNED
    assert "shoal trust sign" in found.detail


@pytest.mark.parametrize("content", [SIGNED.replace(b'"size":10', b'"size":11'), SIGNED + b" ", SIGNED[:-1], b""])
def test_a_manifest_whose_bytes_were_changed(tmp_path: Path, repository: TufRepository, content: bytes) -> None:
    assert refusal(tmp_path, repository, content=content).code is WireErrorCode.UNTRUSTED


def test_a_manifest_of_another_model(tmp_path: Path) -> None:
    """Who may sign for one model can't sign for another: the delegation's path does not fit."""
    repository = TufRepository(models=("m", "other"))
    repository.add("model.other", PATH, SIGNED)
    assert refusal(tmp_path, repository).code is WireErrorCode.UNSIGNED
    repository.add("trials", PATH, SIGNED)
    assert refusal(tmp_path, repository).code is WireErrorCode.UNSIGNED


def test_a_candidate_that_was_signed_to_be_measured_does_not_serve(tmp_path: Path, repository: TufRepository) -> None:
    other = manifest("b", version="2")
    repository.add("trials", other.trial_path, msgspec.json.encode(other))
    verify(tmp_path, repository, other.trial_path, msgspec.json.encode(other))
    assert refusal(tmp_path, repository, other.target_path, msgspec.json.encode(other)).code is WireErrorCode.UNSIGNED


def test_rollback_of_the_timestamp(tmp_path: Path, repository: TufRepository) -> None:
    old = dict(repository.files)
    repository.add("model.m", "m/2/w.json", b"newer")
    verify(tmp_path, repository)
    repository.files = old
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED


def test_rollback_after_local_files_were_lost(tmp_path: Path, repository: TufRepository) -> None:
    old = dict(repository.files)
    repository.add("model.m", "m/2/w.json", b"newer")
    verify(tmp_path, repository)
    repository.files = old
    (tmp_path / "trust" / "timestamp.json").write_bytes(b"\0\0")
    (tmp_path / "trust" / "snapshot.json").unlink()
    assert "rolled back" in refusal(tmp_path, repository).detail


def test_rollback_of_a_role_by_who_holds_the_online_keys(tmp_path: Path, repository: TufRepository) -> None:
    repository.add("model.m", "m/2/w.json", b"newer")
    verify(tmp_path, repository)
    repository.delegated["model.m"].version -= 1
    repository.snapshot.version += 1
    repository.timestamp.version += 1
    repository.publish()
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED


def test_freeze(tmp_path: Path, repository: TufRepository) -> None:
    verify(tmp_path, repository)
    found = refusal(tmp_path, repository, days=31)
    assert found.code is WireErrorCode.METADATA_EXPIRED
    assert "clock" in found.detail


def test_grace_is_bounded(tmp_path: Path, repository: TufRepository) -> None:
    verify(tmp_path, repository, days=31, grace_s=2 * DAY)
    assert refusal(tmp_path, repository, days=33, grace_s=2 * DAY).code is WireErrorCode.METADATA_EXPIRED


def test_a_clock_set_back_does_not_revive_what_has_expired(tmp_path: Path, repository: TufRepository) -> None:
    old = dict(repository.files)
    repository.days = 90
    for part in (repository.root, repository.targets, repository.snapshot, repository.timestamp):
        part.expires = repository.expiry()
    for role in repository.delegated.values():
        role.expires = repository.expiry()
    repository.root.version += 1
    repository.publish_root()
    repository.timestamp.version += 1
    repository.snapshot.version += 1
    repository.targets.version += 1
    repository.delegated["model.m"].version += 1
    repository.delegated["trials"].version += 1
    repository.publish()
    verify(tmp_path, repository, days=60)
    # Timestamp and snapshot of then, and a root that nobody has seen expire: only time speaks against them.
    repository.files = old
    for left in ("timestamp.json", "snapshot.json", "targets.json"):
        (tmp_path / "trust" / left).unlink()
    shutil.rmtree(tmp_path / "trust" / "root_history")
    assert refusal(tmp_path, repository, days=0).code is WireErrorCode.METADATA_EXPIRED


def test_mix_and_match(tmp_path: Path, repository: TufRepository) -> None:
    """A snapshot of one state with a role's file of another."""
    other = manifest("b", version="2")
    old = repository.files["2.model.m.json"]
    repository.add("model.m", other.target_path, msgspec.json.encode(other))
    repository.files["3.model.m.json"] = old
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED


def test_a_file_that_is_too_long(tmp_path: Path, repository: TufRepository) -> None:
    repository.files["timestamp.json"] += b" " * 20_000
    assert "longer" in refusal(tmp_path, repository).detail


def test_data_without_end(tmp_path: Path, repository: TufRepository) -> None:
    """Every piece says that there is more; the device stops at the bound of the file."""
    pieces = 0

    def ask(file: str, offset: int) -> TrustPiece:
        nonlocal pieces
        if file != "2.root.json":
            return repository.ask()(file, offset)
        pieces += 1
        return TrustPiece(file, offset, LIMITS.trust_file_bytes, b" " * LIMITS.trust_piece_bytes)

    device = TrustClient(tmp_path / "trust", repository.files["1.root.json"], PieceFetcher(ask))
    with pytest.raises(TrustError, match="longer"):
        device.refresh()
    assert pieces <= 3


@pytest.mark.parametrize(
    "piece",
    [
        TrustPiece("other.json", 0, 4, b"null"),
        TrustPiece("timestamp.json", 1, 4, b"ull"),
        TrustPiece("timestamp.json", 0, 4, b""),
    ],
)
def test_pieces_that_do_not_fit(tmp_path: Path, repository: TufRepository, piece: TrustPiece) -> None:
    def ask(file: str, offset: int) -> TrustPiece:
        return piece if file == "timestamp.json" else repository.ask()(file, offset)

    device = TrustClient(tmp_path / "trust", repository.files["1.root.json"], PieceFetcher(ask))
    with pytest.raises(UnavailableError):
        device.refresh()


@pytest.mark.parametrize("junk", [b"", b"null", b"[" * 10_000, b'{"signed":{"_type":"timestamp"}}', b"\xff\xfe"])
def test_junk_for_metadata(tmp_path: Path, repository: TufRepository, junk: bytes) -> None:
    repository.files["timestamp.json"] = junk
    with pytest.raises((TrustError, UnavailableError)):
        verify(tmp_path, repository)


def test_a_key_of_nobody(tmp_path: Path, repository: TufRepository) -> None:
    repository.signers["targets"] = [CryptoSigner.generate_ed25519()]
    repository.add("model.m", PATH, SIGNED)
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED


def test_one_signature_where_two_are_needed(tmp_path: Path, repository: TufRepository) -> None:
    second = CryptoSigner.generate_ed25519()
    repository.root.add_key(second.public_key, "targets")
    repository.root.roles["targets"].threshold = 2
    repository.root.version += 1
    repository.publish_root()
    repository.add("model.m", "m/2/w.json", b"newer")
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED
    repository.signers["targets"].append(second)
    repository.add("model.m", "m/3/w.json", b"newest")
    verify(tmp_path, repository)


def test_a_root_that_the_old_one_did_not_sign(tmp_path: Path, repository: TufRepository) -> None:
    verify(tmp_path, repository)
    stranger = TufRepository()
    stranger.root.version = 2
    stranger.publish_root()
    repository.files["2.root.json"] = stranger.files["2.root.json"]
    assert refusal(tmp_path, repository).code is WireErrorCode.UNTRUSTED


def test_a_root_is_not_taken_back_when_its_file_was_lost(tmp_path: Path, repository: TufRepository) -> None:
    verify(tmp_path, repository)
    repository.root.version = 2
    repository.publish_root()
    verify(tmp_path, repository)
    del repository.files["2.root.json"]
    (tmp_path / "trust" / "root_history" / "2.root.json").write_bytes(b"")
    assert "withholds" in refusal(tmp_path, repository).detail


def test_timestamps_may_start_anew_when_their_key_was_rotated(tmp_path: Path, repository: TufRepository) -> None:
    """Recovery from somebody who used a stolen key to make versions that can't be exceeded."""
    repository.timestamp.version = 1_000_000
    repository.publish()
    verify(tmp_path, repository)
    fresh = CryptoSigner.generate_ed25519()
    repository.root.revoke_key(repository.signers["timestamp"][0].public_key.keyid, "timestamp")
    repository.root.add_key(fresh.public_key, "timestamp")
    repository.root.version += 1
    repository.signers["timestamp"] = [fresh]
    repository.timestamp.version = 1
    repository.publish_root()
    repository.publish()
    verify(tmp_path, repository)


@pytest.mark.parametrize(
    "name", [FIRST_ROOT, PROVEN, "timestamp.json", "snapshot.json", "targets.json", "model.m.json"]
)
def test_a_damaged_file_does_not_brick_the_device(tmp_path: Path, repository: TufRepository, name: str) -> None:
    verify(tmp_path, repository)
    (tmp_path / "trust" / name).write_bytes(b"\0" * 50)
    (tmp_path / "trust" / ".timestamp.json.99999999.tmp").write_bytes(b"half")
    verify(tmp_path, repository)
    assert not (tmp_path / "trust" / ".timestamp.json.99999999.tmp").exists()


def test_without_a_root_nothing_is_trusted(tmp_path: Path, repository: TufRepository) -> None:
    with pytest.raises(TrustError) as found:
        TrustClient(tmp_path, None, PieceFetcher(repository.ask()))
    assert found.value.code is WireErrorCode.NO_TRUSTED_ROOT
    assert "root_file" in found.value.detail


def test_a_configured_root_counts_and_not_what_came_first(tmp_path: Path, repository: TufRepository) -> None:
    stranger = TufRepository()
    stranger.add("model.m", PATH, SIGNED)
    verify(tmp_path, stranger)
    device = client(tmp_path, stranger, root=repository.files["1.root.json"])
    with pytest.raises(TrustError):
        device.refresh()


def test_a_root_that_has_expired_is_followed_to_its_successor(tmp_path: Path, repository: TufRepository) -> None:
    repository.root.expires = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    repository.publish_root()
    assert refusal(tmp_path, repository).code is WireErrorCode.METADATA_EXPIRED
    repository.root.expires = repository.expiry()
    repository.root.version = 2
    repository.publish_root()
    verify(tmp_path, repository)


def test_the_messages_are_bounded(repository: TufRepository) -> None:
    from agent.protocol.codec import decode
    from agent.protocol.errors import WireError

    large = TrustPiece("timestamp.json", 0, LIMITS.trust_file_bytes, b" " * (LIMITS.trust_piece_bytes + 1))
    for piece in (large, TrustPiece("../x", 0, 1, b"x"), TrustPiece("a.json", 0, LIMITS.trust_file_bytes + 1, b"x")):
        with pytest.raises(WireError):
            decode(encode(piece), TrustPiece)
    assert Metadata[Root].from_bytes(repository.files["1.root.json"]).signed.version == 1
