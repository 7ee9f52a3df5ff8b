"""Wheel and sdist of the distribution, the same to the byte wherever and whenever they are built."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from deploy.release.sources import copy_tracked, epoch

# In a process of its own for each: setuptools keeps state, and works in the folder it is started in.
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def build_wheel(target: Path) -> Path:
    """Build the wheel into a folder.

    Raises:
        subprocess.CalledProcessError: when setuptools does not.
    """
    return _build("wheel", target)


def build_sdist(target: Path) -> Path:
    """Build the sdist into a folder; its members get one time, one owner and one order.

    Raises:
        subprocess.CalledProcessError: when setuptools does not.
    """
    path = _build("sdist", target)
    moment = epoch()
    plain = io.BytesIO()
    with tarfile.open(path) as made, tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as again:
        for member in sorted(made.getmembers(), key=lambda one: one.name):
            content = made.extractfile(member) if member.isfile() else None
            member.pax_headers = {}
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            again.addfile(member, content)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=moment) as packed:
        packed.write(plain.getvalue())
    return path


def _build(kind: str, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        copy_tracked(Path(name) / "source")
        out = Path(name) / "out"
        out.mkdir()
        subprocess.run(
            [sys.executable, "-c", BUILD, kind, str(out)],
            cwd=Path(name) / "source",
            env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), "PYTHONPATH": ""},
            umask=0o022,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (built,) = out.iterdir()
        path = target / built.name
        path.write_bytes(built.read_bytes())
    return path
