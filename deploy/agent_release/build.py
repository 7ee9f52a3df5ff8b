"""Builds a release of the agent of this tree, for this platform: `make agent-release`.

A bundle is a tar of plain files without times and owners, so that the same tree gives the same bytes and little travels
of the next one. What it holds of libraries is what `deploy/locks/agent.lock` names, or what `--site` holds.
"""

from __future__ import annotations

import argparse
import compileall
import io
import py_compile
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import msgspec

from agent.launcher import LAUNCHER
from agent.protocol.release import INFO, SITE, ReleaseInfo, info_problem, own_platform

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
SUFFIX = ".shoal-release"


def main() -> None:
    """Build one, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder that it goes into")
    parser.add_argument("--version", default="", help="in the place of the tree's own")
    parser.add_argument("--after", default="", help="the oldest version that it may follow; any when absent")
    parser.add_argument(
        "--site", type=Path, help="libraries, installed by `pip install --target`; the lock's when absent"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agent-release-") as name:
        site = Path(name) / SITE
        if options.site:
            shutil.copytree(options.site, site)
        else:
            install(site)
        print(build(site, options.output, version=options.version, after=options.after))


def install(site: Path) -> None:
    """Libraries of the lock into a folder."""
    lock = ROOT / "deploy" / "locks" / "agent.lock"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([*command, "--require-hashes", "--only-binary", ":all:", "--requirement", str(lock)], check=True)


def build(site: Path, output: Path, *, version: str = "", after: str = "", compiled: bool = True) -> Path:
    """A bundle of this tree's agent and a folder of libraries.

    Args:
        site: the libraries; the agent is copied into it.
        output: the folder that the bundle goes into.
        version: in the place of the tree's own.
        after: the oldest version that it may follow.
        compiled: whether modules are compiled: a device that does it itself starts later each time.

    Returns:
        Where it is.
    """
    shutil.rmtree(site / "agent", ignore_errors=True)
    shutil.copytree(ROOT / "agent", site / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    module = site / "agent" / "__init__.py"
    if version:
        module.write_text(VERSION.sub(f'__version__ = "{version}"', module.read_text()))
    found = VERSION.search(module.read_text())
    assert found is not None
    return pack(site, output, version=found[1], after=after, compiled=compiled)


def pack(site: Path, output: Path, *, version: str, after: str = "", compiled: bool = True) -> Path:
    """A bundle of a folder that an interpreter imports from.

    Raises:
        SystemExit: when it can't be one, naming why.
    """
    if compiled:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # the bundle's files have no times
        compileall.compile_dir(site, quiet=1, invalidation_mode=mode, stripdir=str(site.parent), workers=1)
    files = sorted(one for one in site.rglob("*") if one.is_file() and not one.is_symlink())
    info = ReleaseInfo(
        version, own_platform(), sum(one.stat().st_size for one in files) + 4096, launcher=LAUNCHER, after=after
    )
    problem = info_problem(info)
    if problem:
        sys.exit(problem)
    output.mkdir(parents=True, exist_ok=True)
    bundle = output / f"shoal-agent-{version}-{info.platform}{SUFFIX}"
    with tarfile.open(bundle, "w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, INFO, msgspec.json.encode(info), 0o644)
        for one in files:
            executable = one.stat().st_mode & 0o100
            name = f"{SITE}/{one.relative_to(site).as_posix()}"
            _add(archive, name, one.read_bytes(), 0o755 if executable else 0o644)
    return bundle


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
