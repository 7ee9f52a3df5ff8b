"""A release, into dist/: `python -m deploy.release.release`, by `make release`, which makes the SBOM first.

Everything is built of what git tracks, with the time of the last commit (or SOURCE_DATE_EPOCH): who builds it again
gets the same checksums.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from deploy.debian import build as debian
from deploy.release.python_packages import build_sdist, build_wheel
from deploy.release.sources import ROOT, changes, debian_version, version

DIST = ROOT / "dist"
SUMS = "SHA256SUMS"
ARCHITECTURES = ("amd64", "arm64")


def main() -> None:
    """Build everything, and say what it is."""
    os.umask(0o022)
    if sys.version_info[:2] != debian.PYTHON:
        sys.exit("a release is built by Python 3.11, which Debian 12 has")
    wheel = build_wheel(DIST)
    made = [wheel, build_sdist(DIST)]
    notes = DIST / f"CHANGES-{version()}.md"
    notes.write_text(changes(version()))
    made.append(notes)
    for package in debian.PACKAGES.values():
        made += [debian.build(package, wheel, arch, DIST) for arch in ARCHITECTURES]
    boms = sorted(DIST.glob("sbom-*.cdx.json"))
    if not boms:
        sys.exit("there is no SBOM in dist/: make release makes it first")
    made += boms
    (DIST / SUMS).write_text("".join(f"{_digest(path)}  {path.name}\n" for path in sorted(made)))
    for path in sorted(made):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")
    print(f"{SUMS} lists them: Shoal {version()} ({debian_version()})")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
