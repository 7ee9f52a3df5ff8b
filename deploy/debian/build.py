"""Debian packages of agent and server: `python -m deploy.debian.build [--arch amd64] [--out dist] [NAME …]`.

Each is an environment of its own in /opt: the wheel and what its lock names, to the byte, for Debian 12's python3.11.
What the interpreter needs beside it comes from Debian. Nothing is compiled for a machine, so arm64 packages are made on
amd64 as well.
"""

from __future__ import annotations

import argparse
import compileall
import gzip
import hashlib
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from deploy.release.python_packages import build_wheel
from deploy.release.sources import ROOT, changes, debian_version, epoch, settle, version

HERE = Path(__file__).parent
UNITS = ROOT / "deploy" / "systemd"
PYTHON = (3, 11)  # Debian 12's
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
GLIBC_MINORS = range(36, 4, -1)  # Debian 12 has 2.36; wheels for older ones run there
LEVEL = 15  # of zstd: xz takes ten times as long for a tenth less
MAINTAINER = "The Shoal authors <shoal@localhost>"


@dataclass(frozen=True)
class Package:
    """One of them.

    Attributes:
        name: of the package, and of its folder in /opt and in deploy/debian.
        lock: whose packages go into it.
        commands: console scripts of pyproject.toml that it has, in /usr/bin too.
        units: systemd's files.
        leave_out: packages of our wheel that it has no use for.
        examples: drop-ins that are documentation.
    """

    name: str
    lock: str
    commands: tuple[str, ...]
    units: tuple[str, ...]
    leave_out: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


PACKAGES = {
    "shoal-agent": Package(
        "shoal-agent",
        "agent",
        ("shoal-agent",),
        ("shoal-agent.service", "shoal-agent-enroll.service"),
        leave_out=("fleet_server", "converters"),
        examples=tuple(sorted(path.name for path in (UNITS / "drop-ins").glob("*.conf"))),
    ),
    "shoal-server": Package(
        "shoal-server",
        "server-convert",
        ("shoal", "shoal-server"),
        ("shoal-server.service", "shoal-local-token.service"),
    ),
}


def main() -> None:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(prog="deploy.debian.build", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PACKAGES], help="which; all when absent")
    parser.add_argument("--arch", choices=MACHINES, default=_own_architecture())
    parser.add_argument("--level", type=int, default=LEVEL, metavar="N", help="of compression, 1 (fast) to 22 (small)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    os.umask(0o022)
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"Debian 12 has Python 3.11; this is {sys.version.split()[0]}: run it by python3.11 (make PYTHON=…)")
    with tempfile.TemporaryDirectory() as name:
        wheel = build_wheel(Path(name))
        for package in options.names or PACKAGES:
            path = build(PACKAGES[package], wheel, options.arch, options.out, level=options.level)
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", flush=True)


def build(package: Package, wheel: Path, arch: str, out: Path, *, level: int = LEVEL) -> Path:
    """Build one of them; the same bytes for the same sources, lock and architecture.

    Raises:
        subprocess.CalledProcessError: when pip or dpkg-deb fails; they have said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        _environment(root, package, wheel, arch)
        _files(root, package)
        settle(root, epoch())
        _control(root, package, arch)
        path = out / f"{package.name}_{debian_version()}_{arch}.deb"
        subprocess.run(
            [
                "dpkg-deb",
                "--root-owner-group",
                "-Zzstd",
                f"-z{level}",
                "--threads-max=1",
                "--build",
                str(root),
                str(path),
            ],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch())},
            umask=0o022,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path


def _environment(root: Path, package: Package, wheel: Path, arch: str) -> None:
    """/opt/NAME: a virtual environment of Debian's interpreter."""
    prefix = root / "opt" / package.name
    site = prefix / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").symlink_to("/usr/bin/python3.11")
    (prefix / "bin" / "python3").symlink_to("python")
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n")
    machine = MACHINES[arch]
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [f"manylinux2014_{machine}"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
            *("--no-deps", "--require-hashes", "--requirement", str(ROOT / "deploy/locks" / f"{package.lock}.lock")),
            *("--target", str(site), "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"),
            *(word for tag in tags for word in ("--platform", tag)),
        ],
        umask=0o022,
        check=True,
    )
    shutil.rmtree(site / "bin", ignore_errors=True)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    for name in package.leave_out:
        shutil.rmtree(site / name)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in package.commands:
        module, _, called = scripts[name].partition(":")
        script = prefix / "bin" / name
        script.write_text(
            f"#!/opt/{package.name}/bin/python\nimport sys\n\nfrom {module} import {called}\n\nsys.exit({called}())\n"
        )
        script.chmod(0o755)
    # Compiled here: the daemons may write nothing in /opt. By content, not by time: the same bytes in every build.
    compiled = compileall.compile_dir(
        str(prefix / "lib"),
        stripdir=str(root),
        prependdir="/",
        quiet=2,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not compiled:
        print("some modules can't be compiled by this Python; they are left as they are", file=sys.stderr)


def _files(root: Path, package: Package) -> None:
    """Units, configuration, commands and documentation."""
    source = HERE / package.name
    units = root / "lib" / "systemd" / "system"
    units.mkdir(parents=True)
    for name in package.units:
        shutil.copyfile(UNITS / name, units / name)
    for path in sorted((source / "etc").rglob("*")):
        if path.is_file():
            copy = root / "etc" / path.relative_to(source / "etc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(0o640)  # they may come to hold passwords
    commands = root / "usr" / "bin"
    commands.mkdir(parents=True)
    for name in package.commands:
        (commands / name).symlink_to(f"/opt/{package.name}/bin/{name}")
    documentation = root / "usr" / "share" / "doc" / package.name
    documentation.mkdir(parents=True)
    for name in ("operations.md", "security.md", "deploying.md"):
        shutil.copyfile(ROOT / "docs" / name, documentation / name)
    for name in package.examples:
        (documentation / "examples").mkdir(exist_ok=True)
        shutil.copyfile(UNITS / "drop-ins" / name, documentation / "examples" / name)
    shutil.copyfile(HERE / "copyright", documentation / "copyright")
    _pack(documentation / "changelog.gz", _debian_changelog(package))
    overrides = root / "usr" / "share" / "lintian" / "overrides" / package.name
    overrides.parent.mkdir(parents=True)
    overrides.write_text((HERE / "lintian-overrides").read_text().replace("PACKAGE", package.name))


def _control(root: Path, package: Package, arch: str) -> None:
    """DEBIAN/: what dpkg reads."""
    folder = root / "DEBIAN"
    folder.mkdir()
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    size = sum(-(-path.stat().st_size // 1024) for path in files)
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files]
    (folder / "md5sums").write_text("".join(sums))
    written = (HERE / package.name / "control").read_text()
    (folder / "control").write_text(
        f"Package: {package.name}\nVersion: {debian_version()}\nArchitecture: {arch}\nMaintainer: {MAINTAINER}\n"
        f"Installed-Size: {size}\n{written}"
    )
    (folder / "conffiles").write_text(
        "".join(f"/{path.relative_to(root)}\n" for path in files if path.relative_to(root).parts[0] == "etc")
    )
    for name in ("preinst", "postinst", "prerm", "postrm"):
        script = HERE / package.name / name
        if script.exists():
            shutil.copyfile(script, folder / name)
            (folder / name).chmod(0o755)
    settle(folder, epoch())
    folder.chmod(0o755)


def _debian_changelog(package: Package) -> bytes:
    entries = [line for line in changes(version()).splitlines() if line.startswith("- ")]
    date = subprocess.run(
        ["date", "-u", "-R", "-d", f"@{epoch()}"], check=True, capture_output=True, text=True, env={"LC_ALL": "C"}
    ).stdout.strip()
    first = "  * See CHANGELOG.md of this version: " + f"{len(entries)} changes.\n"
    return (
        f"{package.name} ({debian_version()}) bookworm; urgency=medium\n\n{first}\n -- {MAINTAINER}  {date}\n".encode()
    )


def _pack(path: Path, content: bytes) -> None:
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(content)


def _own_architecture() -> str:
    own = os.uname().machine
    return next((arch for arch, machine in MACHINES.items() if machine == own), "amd64")


if __name__ == "__main__":
    main()
