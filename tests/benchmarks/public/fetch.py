"""Members of packages from the Python index and from Debian, by pinned digests."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def from_index(cache: Path, requirement: str, digest: str, members: dict[str, str]) -> dict[str, Path]:
    """Files out of a package of the Python index.

    Args:
        cache: folder that keeps them.
        requirement: such as `silero-vad==6.2.0`.
        digest: SHA-256 of the wheel or source archive.
        members: path in the archive by a name of ours.
    """
    kept = {name: cache / f"{digest[:12]}-{name}" for name in members}
    if all(path.exists() for path in kept.values()):
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
        subprocess.run(command, check=True)
        archive = next(path for path in folder.iterdir() if path != wanted)
        for ours, member in members.items():
            part = folder / "part"
            part.write_bytes(_read(archive, member))
            part.replace(kept[ours])
    return kept


def _read(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as source:
        found = source.extractfile(member)
        assert found is not None
        return found.read()


def from_debian(cache: Path, package: str, version: str, digest: str) -> Path:
    """The unpacked files of a Debian package; nothing is installed."""
    folder = cache / f"{package}-{version}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        subprocess.run(["apt-get", "download", "-qq", f"{package}={version}"], check=True, cwd=name)
        packed = next(Path(name).glob("*.deb"))
        if hashlib.sha256(packed.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{package} holds other data than expected; nothing was kept")
        fresh = Path(name) / "files"
        subprocess.run(["dpkg", "-x", str(packed), str(fresh)], check=True)
        fresh.replace(folder)
    return folder
