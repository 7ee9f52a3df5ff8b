"""Releases of the agent: what is decided of them, which fit a device, and what a bundle may hold."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import msgspec
import pytest

from agent.launcher import release_folder
from agent.protocol.codec import decode, encode
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import DesiredState
from agent.protocol.release import INFO, DesiredRelease, ReleaseInfo, ReleaseManifest, fits_platform, misfit
from agent.protocol.version import SPOKEN, ProtocolRange
from agent.releases.book import ATTEMPTS, ReleaseBook
from agent.releases.folder import BundleError, Failed, ReleaseFolder

PLATFORM = "linux-x86_64-glibc-cp311"
INFO_2 = ReleaseInfo("2.0.0", PLATFORM, 10_000)
MANIFEST = ReleaseManifest("a" * 64, 1000, 256, INFO_2)


def wanted(key: str, manifest: ReleaseManifest | None = MANIFEST) -> DesiredRelease:
    return DesiredRelease(key, msgspec.Raw(msgspec.json.encode(manifest)))


def book(*phases: Phase, key: str = "r-1") -> ReleaseBook:
    found = ReleaseBook(b"")
    found.desired(wanted(key))
    for phase in phases:
        found.set(found.records[key], phase)
    return found


TO_TRIAL = (Phase.DOWNLOADING, Phase.VERIFYING, Phase.LOADING, Phase.PROBATION)


def test_one_release_is_wanted_at_a_time() -> None:
    found = book(Phase.DOWNLOADING)
    gone, fresh = found.desired(wanted("r-2"))
    assert gone is not None
    assert fresh is not None
    assert (gone.deployment_id, gone.phase, fresh.deployment_id) == ("r-1", Phase.SUPERSEDED, "r-2")
    assert found.desired(wanted("r-2")) == (None, None)
    gone, fresh = found.desired(None)
    assert (gone and gone.deployment_id, fresh) == ("r-2", None)


@pytest.mark.parametrize(
    ("running", "current", "on_trial", "failed", "phase"),
    [
        ("a" * 64, "", True, None, Phase.PROBATION),  # it goes on being tried
        ("a" * 64, "a" * 64, False, None, Phase.ACTIVE),  # it had proved itself when the power went
        ("", "", False, None, Phase.PENDING),  # the power went before its pointer was there
        ("", "", False, Failed("it ended with 3", 2), Phase.ROLLED_BACK),
        ("", "", False, Failed("it is not whole", 0), Phase.FAILED),
    ],
)
def test_a_trial_is_taken_up_where_it_ended(
    running: str, current: str, on_trial: bool, failed: Failed | None, phase: Phase
) -> None:
    found = ReleaseBook(book(*TO_TRIAL).packed())
    found.recover(running=running, current=current, on_trial=on_trial, failed=failed)
    record = found.records["r-1"]
    assert record.phase is phase
    assert (record.failure.detail if record.failure else None) == (failed.reason if failed else None)


def test_what_is_begun_too_often_fails() -> None:
    found = book(Phase.DOWNLOADING)
    for _ in range(ATTEMPTS):
        found.recover(running="", current="", on_trial=False, failed=None)
        if found.records["r-1"].phase is Phase.PENDING:
            found.set(found.records["r-1"], Phase.DOWNLOADING)
    assert found.records["r-1"].phase is Phase.FAILED


def test_a_newer_agents_book_is_read_and_a_damaged_one_is_said() -> None:
    packed = msgspec.json.decode(book().packed())
    packed[0]["of_a_newer_agent"] = {"x": 1}
    assert ReleaseBook(msgspec.json.encode(packed)).records["r-1"].phase is Phase.PENDING
    assert ReleaseBook(b"of another form").lost


@pytest.mark.parametrize(
    ("of_release", "of_device", "fits"),
    [
        (PLATFORM, PLATFORM, True),
        ("linux-x86_64-glibc-any", PLATFORM, True),
        (PLATFORM, "linux-x86_64-glibc-cp312", False),
        (PLATFORM, "linux-aarch64-glibc-cp311", False),
        ("linux-x86_64-musl-any", PLATFORM, False),
        (PLATFORM, "", False),
    ],
)
def test_platforms(of_release: str, of_device: str, fits: bool) -> None:
    assert fits_platform(of_release, of_device) is fits


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"platform": "linux-armv7l-glibc-cp311"}, "push a bundle for that platform"),
        ({"launcher": 2}, "needs launcher 2"),
        ({"after": "1.10"}, "roll out a version between"),
        ({"after": "1.2.3"}, None),
        ({"protocol": ProtocolRange(9, 8)}, "speaks protocol"),
    ],
)
def test_a_release_that_does_not_fit_says_what_would_mend_it(fields: dict[str, object], said: str | None) -> None:
    manifest = msgspec.structs.replace(MANIFEST, info=msgspec.structs.replace(INFO_2, **fields))
    found = misfit(manifest, platform=PLATFORM, launcher=1, version="1.9.0")
    assert (found is None) if said is None else (found is not None and said in found[1])


@pytest.mark.parametrize(
    "fields",
    [{"digest": "x"}, {"size": 0}, {"chunk_size": 1 << 30}]
    + [
        {"info": msgspec.structs.replace(INFO_2, **one)}
        for one in (
            {"version": "../2"}, {"platform": "linux"}, {"entry": "os; x"}, {"unpacked": 1 << 40},
            {"interpreter": "../python"}, {"interpreter": "bin/python"},
        )
    ],
)  # fmt: skip
def test_hostile_manifests_are_refused(fields: dict[str, object]) -> None:
    state = DesiredState(SPOKEN, "f", 1, agent=wanted("r-1", msgspec.structs.replace(MANIFEST, **fields)))
    with pytest.raises(WireError) as error:
        decode(encode(state), DesiredState)
    assert error.value.code is WireErrorCode.MALFORMED


def test_an_older_servers_state_wants_nothing_of_the_agent() -> None:
    body = msgspec.json.decode(encode(DesiredState(SPOKEN, "f", 1)))
    del body["agent"]
    assert decode(msgspec.json.encode(body), DesiredState).agent is None
    state = DesiredState(SPOKEN, "f", 1, agent=wanted("r-1", None))
    read = decode(encode(state), DesiredState).agent
    assert read is not None
    assert read.read_manifest() is None


def bundle(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], info: ReleaseInfo = INFO_2) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, content in [(tarfile.TarInfo(INFO), msgspec.json.encode(info)), *members]:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def plain(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_a_bundle_is_unpacked_whole(tmp_path: Path) -> None:
    folder = ReleaseFolder(tmp_path / "agent")
    folder.add("a" * 64, bundle(tmp_path / "b", [plain("site/agent/x.py")]), INFO_2)
    assert folder.has("a" * 64)
    assert (tmp_path / "agent/releases" / ("a" * 64) / "site/agent/x.py").read_bytes() == b"x"


@pytest.mark.parametrize(
    "members",
    [
        [plain("../x")],
        [plain("/etc/x")],
        [plain("site/../../x")],
        [link("site/x", "/etc/passwd", tarfile.SYMTYPE)],
        [link("site/x", "release.json", tarfile.LNKTYPE)],
        [link("site/x", "", tarfile.FIFOTYPE)],
        [plain("site/x", b"x" * 20_000)],
        [plain("x")],
    ],
)
def test_a_bundle_that_holds_what_none_may_leaves_nothing(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    folder = ReleaseFolder(tmp_path / "agent")
    with pytest.raises((BundleError, FileExistsError)):
        folder.add("a" * 64, bundle(tmp_path / "b", members), INFO_2)
    assert not folder.has("a" * 64)
    assert list((tmp_path / "agent" / "releases").iterdir()) == []


def test_a_bundle_says_what_was_signed_of_it(tmp_path: Path) -> None:
    other = bundle(tmp_path / "b", [plain("site/x")], msgspec.structs.replace(INFO_2, version="3"))
    with pytest.raises(BundleError, match="not what was signed"):
        ReleaseFolder(tmp_path / "agent").add("a" * 64, other, INFO_2)


def test_where_releases_lie_and_whether_the_owner_allows_any(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('state_dir = "/srv/agent"\n')
    assert release_folder(["run", "--config", str(config)], {}) == "/srv/agent/agent"
    assert release_folder([f"--config={config}"], {"SHOAL_AGENT_STATE_DIR": "/x"}) == "/x/agent"
    assert release_folder(["run"], {}) == "/var/lib/shoal-agent/agent"
    for text in ("state_dir = '/srv/a'  # said otherwise\n", 'x = """\nstate_dir = "/b"\n"""\nstate_dir = "/srv/a"\n'):
        config.write_text(text)
        assert release_folder(["--config", str(config)], {}) == "/srv/a/agent"
    config.write_text('[tags]\nstate_dir = "/of/a/table"\n')
    assert release_folder(["--config", str(config)], {}) == "/var/lib/shoal-agent/agent"
    config.write_text("state_dir = \n")
    assert release_folder(["--config", str(config)], {}) is None
    config.write_text('self_update = "off"\n')
    assert release_folder(["run", "--config", str(config)], {}) is None
    assert release_folder(["run", "--config", str(tmp_path / "none")], {}) is None
