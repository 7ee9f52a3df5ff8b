"""Chunks in any order, twice, lost or wrong: the artifact is whole and right in the end, or refused."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.update.download import DownloadProgress
from agent.update.store import ArtifactStore, Part

CHUNK = 8


def manifest(content: bytes, *, digest: str | None = None) -> Manifest:
    return Manifest(
        digest or hashlib.sha256(content).hexdigest(), len(content), CHUNK, "m", "1", "v", "p", ModelFormat.ONNX,
        RuntimeName.ONNX, Precision.FP32, (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),),
    )  # fmt: skip


def chunks(content: bytes) -> list[bytes]:
    return [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]


def write_all(part: Part, content: bytes) -> None:
    for index, piece in enumerate(chunks(content)):
        part.write(index, piece)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_any_order_any_repetition_any_restart(content: bytes, data: st.DataObject) -> None:
    pieces = chunks(content)
    folder = Path(tempfile.mkdtemp())
    try:
        store = ArtifactStore(folder)
        part = store.open_part(manifest(content))
        while part.missing:
            index = data.draw(st.integers(-1, len(pieces) + 1), label="chunk")
            fault = data.draw(st.sampled_from(["none", "none", "none", "short", "long", "restart"]), label="fault")
            payload = pieces[index] if 0 <= index < len(pieces) else b"x" * CHUNK
            before = part.missing
            if fault == "short":
                assert not part.write(index, payload[:-1])
            elif fault == "long":
                assert not part.write(index, payload + b"!")
            elif fault == "restart":
                part.close()
                part = ArtifactStore(folder).open_part(manifest(content))
                assert part.missing == before
            else:
                part.write(index, payload)
            if before == part.missing and data.draw(st.booleans(), label="help"):
                first = part.missing_ranges(1)[0].first
                assert part.write(first, pieces[first])
            spans = part.missing_ranges(1000)
            assert sum(span.last - span.first + 1 for span in spans) == part.missing
        assert part.finish()
        assert store.path(manifest(content).digest).read_bytes() == content
        assert [path.name for path in folder.iterdir()] == [manifest(content).digest]
    finally:
        shutil.rmtree(folder)


def test_bytes_of_another_digest_are_thrown_away(tmp_path: Path) -> None:
    wanted = manifest(b"0123456789", digest="f" * 64)
    part = ArtifactStore(tmp_path).open_part(wanted)
    write_all(part, b"0123456789")
    assert not part.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_is_found_and_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = hashlib.sha256(b"good").hexdigest()
    store.path(digest).write_bytes(b"gooD")
    assert store.has(digest)
    assert not store.verify(digest)
    assert not store.has(digest)


def test_garbage_goes_and_what_is_kept_stays(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    kept, gone = manifest(b"kept"), manifest(b"gone")
    for one in (kept, gone):
        store.open_part(one).close()
    store.collect_garbage([kept.digest])
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {kept.digest}


def test_what_was_compiled_goes_with_its_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, keep_bytes=1_000_000)
    first, second = (manifest(body) for body in (b"first", b"second"))
    for one, body in ((first, b"first"), (second, b"second")):
        part = store.open_part(one)
        write_all(part, body)
        assert part.finish()
        engine = store.compiled(one.digest) / "onnxruntime-1" / "tensorrt" / "engine"
        engine.parent.mkdir(parents=True)
        engine.write_bytes(b"engine")
    assert store.held() == sorted([first.digest, second.digest])
    store.collect_garbage([first.digest], [second.digest])
    assert store.compiled(second.digest).is_dir(), "kept to go back to"
    assert store.drop_spare()
    assert not store.compiled(second.digest).exists()
    store.collect_garbage([])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_loses_no_chunk_that_counted(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4
    wanted = manifest(content)
    code = f"""
import os, signal
from pathlib import Path
from tests.unit.agent.test_store_and_download import ArtifactStore, chunks, manifest
content = bytes(range(256)) * 4
part = ArtifactStore(Path({str(tmp_path)!r})).open_part(manifest(content))
for index, piece in enumerate(chunks(content)[:70]):
    part.write(index, piece)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -9
    part = ArtifactStore(tmp_path).open_part(wanted)
    assert part.missing == wanted.chunks - 70
    write_all(part, content)
    assert part.finish()


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_a_full_disk_is_an_error_and_not_a_broken_artifact(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    content = b"a" * 200_000
    part = ArtifactStore(tmp_path).open_part(manifest(content))
    try:
        with pytest.raises(OSError, match="No space left"):
            write_all(part, content)
        assert not ArtifactStore(tmp_path).has(manifest(content).digest)
    finally:
        part.close()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_is_missing_is_said_at_once_then_every_few_chunks_then_ever_more_rarely(tmp_path: Path) -> None:
    content = bytes(40 * CHUNK)
    part = ArtifactStore(tmp_path).open_part(manifest(content))
    download = DownloadProgress("d", part, deadline_s=100.0, now=0.0)
    assert download.need(0.0) is not None
    assert download.need(0.1) is None
    for index in range(8):
        download.take((index,), bytes(CHUNK), 0.2)
    after = download.need(0.2)
    assert after is not None
    assert after.missing[0].first == 8
    said = [now / 10 for now in range(3, 900) if download.need(now / 10) is not None]
    gaps = [second - first for first, second in itertools.pairwise(said)]
    assert len(said) < 15
    assert gaps == sorted(gaps)
    assert not download.overdue(100.0)
    assert download.overdue(100.3)
