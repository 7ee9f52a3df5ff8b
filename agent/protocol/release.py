"""A release of the agent: what is signed of it, what a device is told of it, and where it runs."""

from __future__ import annotations

import platform as machine
import re
import sys

import msgspec

from agent.protocol.delivery import DeliveryPolicy
from agent.protocol.errors import WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Encoding
from agent.protocol.version import CURRENT, OLDEST, ProtocolRange

AGENT = "shoal-agent"  # in the place of a model's name
RELEASES = "@agent-releases"  # begins the TUF target path of every release; no model may be called so
INFO = "release.json"  # the first file of a bundle: a `ReleaseInfo`
SITE = "site"  # the folder of a bundle that the interpreter imports from
ANY_PYTHON = "any"  # of a bundle that brings its own interpreter
VERSION = re.compile(r"[0-9]+(?:\.[0-9]+){0,3}(?:[A-Za-z0-9.+-]{0,32})\Z")
PLATFORM = re.compile(r"[a-z0-9]+-[A-Za-z0-9_]+-[a-z]+-[a-z0-9]+\Z")
_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_PLACE = re.compile(r"(?!/)(?!.*\.\.)[A-Za-z0-9._/+-]{0,200}\Z")


class ReleaseInfo(msgspec.Struct, frozen=True):
    """What a bundle says of itself.

    Attributes:
        version: of the agent in it, such as `0.2.0`.
        platform: where it runs: system, processor, C library and Python, such as `linux-x86_64-glibc-cp311`; `any` in
            the place of the Python where it brings its own interpreter.
        unpacked: bytes that it takes on a device's disk.
        protocol: versions of the wire protocol that it speaks.
        entry: the module that is run.
        interpreter: the path of its own interpreter in it; empty where the device's runs it.
        launcher: the oldest launcher that can start it.
        after: the oldest version of the agent that it may follow, for it reads what that one wrote; empty for any.
    """

    version: str
    platform: str
    unpacked: int
    protocol: ProtocolRange = ProtocolRange(CURRENT, OLDEST)
    entry: str = "agent.main"
    interpreter: str = ""
    launcher: int = 1
    after: str = ""


class ReleaseManifest(msgspec.Struct, frozen=True):
    """One bundle, and what is in it. Its JSON is what is signed (a TUF target), and it pins the bundle's bytes.

    Attributes:
        digest: SHA-256 of the bundle.
        size: bytes.
        chunk_size: bytes of every chunk but the last.
        info: what the bundle says of itself.
    """

    digest: str
    size: int
    chunk_size: int
    info: ReleaseInfo

    @property
    def target_path(self) -> str:
        """Its TUF target path: `@agent-releases/{version}/{platform}.json`."""
        return f"{RELEASES}/{self.info.version}/{self.info.platform}.json"

    @property
    def label(self) -> str:
        """What people call it."""
        return f"agent {self.info.version}"


class DesiredRelease(msgspec.Struct, frozen=True):
    """The release that a device's agent ought to be.

    Attributes:
        deployment_id: the server's id; the same id is the same deployment, however often it is sent.
        manifest: a `ReleaseManifest` as JSON, exactly the bytes that were signed; `null`: what is installed there.
        confirm_s: within how many seconds of its start it must be connected and serve what was served before.
        most_starts: how often it is started at most before it has proved itself; a restart of the machine is one too.
        deadline_s: how long a download may go without a new byte before it fails, in seconds; waiting counts not.
        encodings: ways the bundle may travel other than as it is, the smallest first.
        delivery: how it may come to the device, and when it may be tried.
    """

    deployment_id: str
    manifest: msgspec.Raw = msgspec.Raw(b"null")
    confirm_s: float = 120.0
    most_starts: int = 3
    deadline_s: float = 86_400.0
    encodings: tuple[Encoding, ...] = ()
    delivery: DeliveryPolicy = DeliveryPolicy()

    def read_manifest(self) -> ReleaseManifest | None:
        """The manifest, of a message that was checked; None for what is installed."""
        return read_manifest(bytes(self.manifest))


def read_manifest(content: bytes) -> ReleaseManifest | None:
    """The manifest of its JSON; None for what is installed.

    Raises:
        msgspec.MsgspecError: when it is none.
    """
    return msgspec.json.decode(content, type=ReleaseManifest | None)


def info_problem(info: ReleaseInfo) -> str:
    """What is wrong with what a bundle says of itself, naming the field; empty when nothing is."""
    texts = (
        ("version", VERSION.match(info.version), "it is no version such as 0.2.0"),
        ("platform", PLATFORM.match(info.platform), "it is none such as linux-x86_64-glibc-cp311"),
        ("entry", _ENTRY.match(info.entry), "it is no module's name"),
        ("interpreter", _PLACE.match(info.interpreter), "it is no path in the bundle"),
        ("after", not info.after or VERSION.match(info.after), "it is no version"),
    )
    wrong = [f"{field}: {why}" for field, fits, why in texts if not fits]
    if not 0 < info.unpacked <= LIMITS.release_bytes:
        wrong.append(f"unpacked: it is not between 1 and {LIMITS.release_bytes} bytes")
    if not 1 <= info.launcher < LIMITS.counter:
        wrong.append("launcher: it is out of bounds")
    if (info.platform.rpartition("-")[2] == ANY_PYTHON) != bool(info.interpreter):
        wrong.append("interpreter: a bundle has one exactly where its platform says `any` Python")
    return wrong[0] if wrong else ""


def own_platform() -> str:
    """The platform of this interpreter."""
    libc = "glibc" if machine.libc_ver()[0] == "glibc" else "musl"
    python = f"{'cp' if sys.implementation.name == 'cpython' else 'pp'}{sys.version_info.major}{sys.version_info.minor}"
    return f"{sys.platform}-{machine.machine()}-{libc}-{python}"


def fits_platform(of_release: str, of_device: str) -> bool:
    """Whether a release runs on a device's platform."""
    wanted, _, python = of_release.rpartition("-")
    here, _, has = of_device.rpartition("-")
    return wanted == here and python in {ANY_PYTHON, has}


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it by: what follows them does not count."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(one) for one in found[0].split(".")] if found else []
    return tuple(numbers + [0] * (4 - len(numbers)))


def misfit(
    manifest: ReleaseManifest, *, platform: str, launcher: int, version: str
) -> tuple[WireErrorCode, str] | None:
    """Why a release can't run on a device, with what would mend it; None when it can.

    Args:
        manifest: of the release.
        platform: the device's.
        launcher: the number of the device's launcher.
        version: of the agent that runs there.
    """
    info = manifest.info
    if not fits_platform(info.platform, platform):
        why = f"it is made for {info.platform}, this device is {platform}: push a bundle for that platform"
    elif info.launcher > launcher:
        why = f"it needs launcher {info.launcher}, this device has {launcher}: install its package there, it brings one"
    elif info.after and version_key(version) < version_key(info.after):
        why = f"it may follow {info.after} or newer, {version} runs here: roll out a version between them first"
    elif info.protocol.current < OLDEST or info.protocol.oldest > CURRENT:
        why = f"it speaks protocol {info.protocol.oldest} to {info.protocol.current}, the server {CURRENT}"
    else:
        return None
    return WireErrorCode.RELEASE_UNFIT, why
