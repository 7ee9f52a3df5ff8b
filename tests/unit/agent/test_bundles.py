"""Bundles on a disk: read within bounds, whole or not at all; copied for one device; strange files are refused."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import msgspec
import pytest

from agent.bundle_import import BundleImportError, import_bundle
from agent.config import Config
from agent.protocol.bundle import (
    END,
    INDEX,
    BundleArtifact,
    BundleFile,
    BundleIndex,
    BundleOrder,
    padding,
    read_header,
    read_index,
    read_order,
    write_header,
)
from agent.protocol.errors import WireError
from agent.protocol.manifest import Manifest, manifest_bytes
from agent.protocol.messages import ChunkRange
from agent.source_config import SourceConfig
from agent.update.bundle_file import BundleError, BundlesSeen, BundleWatch, open_bundle, read_chunks
from agent.update.transfer import SourceError, Stop
from tests.unit.agent.test_store_and_download import manifest

ONE, TWO = b"one" * 400, b"two" * 300
METADATA = {"1.root.json": b'{"root": 1}', "timestamp.json": b'{"timestamp": 1}' * 40_000}


def of(content: bytes, profile: str, variant: str) -> Manifest:
    return msgspec.structs.replace(manifest(content), chunk_size=256, profile=profile, variant_id=variant)


MANIFESTS = (of(ONE, "rpi", "v-1"), of(TWO, "x86", "v-2"))


def index(**changed: object) -> BundleIndex:
    order = BundleOrder("line-a", 3, tuple(one.target_path for one in MANIFESTS))
    made = BundleIndex(
        format=1,
        fleet="f",
        made_at=1.0,
        order=msgspec.Raw(msgspec.json.encode(order)),
        manifests=tuple(msgspec.Raw(manifest_bytes(one)) for one in MANIFESTS),
        metadata=tuple(BundleFile(name, len(body)) for name, body in METADATA.items()),
        artifacts=tuple(BundleArtifact(one.digest, one.size) for one in MANIFESTS),
    )
    return msgspec.structs.replace(made, **changed)


def member(name: str, body: bytes) -> bytes:
    return write_header(name, len(body), 0.0) + body + bytes(padding(len(body)))


def bundle(made: BundleIndex | None = None, *, one: bytes = ONE) -> bytes:
    found = member(INDEX, msgspec.json.encode(made or index()))
    for number, body in enumerate(METADATA.values()):
        found += member(f"metadata/{number}", body)
    for content, body in ((ONE, one), (TWO, TWO)):
        found += member(f"artifacts/{hashlib.sha256(content).hexdigest()}", body)
    return found + END


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.shoal-bundle"
    path.write_bytes(bundle())
    return path


def test_a_plain_tar_that_tools_read_too(path: Path) -> None:
    import tarfile

    with tarfile.open(path) as archive:
        assert archive.getnames()[0] == INDEX
        assert archive.extractfile(archive.getmembers()[-1]).read() == TWO  # type: ignore[union-attr]


def test_metadata_and_artifacts_are_read_in_pieces(path: Path) -> None:
    found = open_bundle(path)
    assert found.index.read_order().serial == 3
    assert found.piece("1.root.json", 0).data == METADATA["1.root.json"]
    first = found.piece("timestamp.json", 0)
    second = found.piece("timestamp.json", len(first.data))
    assert first.total == len(METADATA["timestamp.json"])
    assert (first.data + second.data) == METADATA["timestamp.json"][: len(first.data + second.data)]
    assert found.piece("2.root.json", 0).absent
    chunks = dict(read_chunks(found, MANIFESTS[0], (ChunkRange(0, 0), ChunkRange(4, 4)), Stop()))
    assert chunks == {0: ONE[:256], 4: ONE[1024:]}


def test_a_stick_that_was_changed_or_taken_away(path: Path) -> None:
    found = open_bundle(path)
    os.utime(path, (1, 1))
    with pytest.raises(SourceError, match="changed") as caught:
        list(read_chunks(found, MANIFESTS[0], (ChunkRange(0, 0),), Stop()))
    assert caught.value.absent
    path.unlink()
    with pytest.raises(SourceError, match="can't be read"):
        list(read_chunks(found, MANIFESTS[0], (ChunkRange(0, 0),), Stop()))
    with pytest.raises(BundleError):
        found.piece("1.root.json", 0)


@pytest.mark.parametrize("cut", [0, 100, 512, 1500, len(bundle()) // 2, len(bundle()) - 2000])
def test_one_that_is_cut_off(path: Path, cut: int) -> None:
    path.write_bytes(bundle()[:cut])
    with pytest.raises(BundleError):
        open_bundle(path)


def test_links_pipes_and_folders_are_none(tmp_path: Path, path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "none"):
        with pytest.raises(BundleError):
            open_bundle(tmp_path / name)


def test_members_that_are_not_in_the_index(path: Path) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "artifacts/" + "b" * 64, f"artifacts/{MANIFESTS[0].digest}"):
        path.write_bytes(bundle()[: -len(END)] + member(name, b"x") + END)
        with pytest.raises(BundleError, match="its index does not"):
            open_bundle(path)
    link = bytearray(write_header("artifacts/x", 0, 0.0))
    link[156:157] = b"2"
    link[148:156] = f"{sum(link[:148]) + 256 + sum(link[156:]):06o}\0 ".encode()
    path.write_bytes(bundle()[: -len(END)] + bytes(link) + END)
    with pytest.raises(BundleError, match="plain files"):
        open_bundle(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"manifests": ()},
        {"manifests": (msgspec.Raw(manifest_bytes(MANIFESTS[0])),) * 2},
        {"manifests": (msgspec.Raw(b"{}"),)},
        {"order": msgspec.Raw(b'{"name": "../x", "serial": 1, "targets": ["a"]}')},
        {"order": msgspec.Raw(b'{"name": "x", "serial": 0, "targets": ["a"]}')},
        {"metadata": (BundleFile("../1.root.json", 1),)},
        {"metadata": (BundleFile("1.root.json", 1 << 40),)},
        {"metadata": (BundleFile("1.root.json", 1),) * 513},
        {"artifacts": (BundleArtifact("a" * 64, 1 << 60),)},
        {"artifacts": (BundleArtifact("../x", 1),)},
        {"made_at": -1.0},
    ],
)
def test_an_index_out_of_bounds(path: Path, changed: dict[str, object]) -> None:
    with pytest.raises(WireError):
        read_index(msgspec.json.encode(index(**changed)))
    path.write_bytes(bundle(index(**changed)))
    with pytest.raises(BundleError):
        open_bundle(path)


def test_damaged_bytes_are_refused_or_harmless(path: Path) -> None:
    whole, luck = bytearray(bundle()), random.Random(1)
    for _ in range(300):
        broken = bytearray(whole)
        broken[luck.randrange(len(whole))] = luck.randrange(256)
        path.write_bytes(broken)
        try:
            found = open_bundle(path)
        except BundleError:
            continue
        assert all(extent.offset + extent.size <= len(whole) for extent in found.artifacts.values())
    with pytest.raises(WireError):
        read_header(b"\xff" * 512)
    with pytest.raises(WireError):
        read_order(b"[" * 100_000)


def config(tmp_path: Path, profile: str) -> Config:
    return Config("d", tmp_path / "state", sources=SourceConfig(profile=profile))


def test_a_device_copies_what_it_needs(tmp_path: Path, path: Path) -> None:
    target, count = import_bundle(config(tmp_path, "rpi"), path)
    assert count == 1
    assert target == tmp_path / "state" / "bundles" / "line-a.shoal-bundle"
    found = open_bundle(target)
    assert list(found.artifacts) == [MANIFESTS[0].digest]
    assert found.index == open_bundle(path).index
    assert dict(read_chunks(found, MANIFESTS[0], (ChunkRange(0, 0),), Stop())) == {0: ONE[:256]}
    assert import_bundle(config(tmp_path, ""), path)[1] == 2
    with pytest.raises(BundleImportError, match="lacks 1"):
        import_bundle(config(tmp_path, "rpi"), import_then_take(tmp_path, path))


def import_then_take(tmp_path: Path, path: Path) -> Path:
    """A copy for the other profile."""
    return import_bundle(config(tmp_path / "other", "x86"), path)[0]


def test_a_damaged_or_strange_one_is_not_copied(tmp_path: Path, path: Path) -> None:
    path.write_bytes(bundle(one=b"x" * len(ONE)))
    with pytest.raises(BundleImportError, match="other bytes"):
        import_bundle(config(tmp_path, "rpi"), path)
    assert list((tmp_path / "state" / "bundles").iterdir()) == []
    with pytest.raises(BundleImportError, match="it has rpi, x86"):
        import_bundle(config(tmp_path, "arm"), path)
    (tmp_path / "state" / "bundles").rmdir()
    (tmp_path / "state" / "bundles").write_text("in the way")
    with pytest.raises(BundleImportError, match="can't be written"):
        import_bundle(config(tmp_path, "x86"), path)


def test_sticks_come_and_go(tmp_path: Path) -> None:
    media = tmp_path / "media"
    seen: list[BundlesSeen] = []
    watch = BundleWatch([tmp_path / "none", media], seen.append)
    watch.look()
    assert seen == [], "nothing to say"
    (media / "stick").mkdir(parents=True)
    (media / "stick" / "a.shoal-bundle").write_bytes(bundle()[:5000])
    watch.look()
    assert seen == [], "it is still being written"
    (media / "stick" / "a.shoal-bundle").write_bytes(bundle())
    (media / "link.shoal-bundle").symlink_to(media / "stick" / "a.shoal-bundle")
    watch.look()
    watch.look()
    assert [[one.path.name for one in say.bundles] for say in seen] == [["a.shoal-bundle"]]
    (media / "stick" / "a.shoal-bundle").unlink()
    watch.look()
    assert seen[-1].bundles == ()
