"""Orders of bundles, judged by the real process: only the newest that the fleet signed for the device counts."""

from __future__ import annotations

import datetime as dt
import logging
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import Config
from agent.protocol.bundle import END, INDEX, BundleFile, BundleIndex, BundleOrder, padding, write_header
from agent.protocol.manifest import Manifest, manifest_bytes
from agent.protocol.messages import DesiredDeployment
from agent.source_config import SourceConfig
from agent.update.bundle_file import BundlesSeen, open_bundle
from agent.update.bundles import Bundles
from agent.update.journal import Journal
from tests.tuf_repository import TufRepository
from tests.unit.agent.test_updater import manifest


def of(version: str, profile: str = "p") -> Manifest:
    made = manifest("a" if version == "1" else "b", version=version)
    return msgspec.structs.replace(made, profile=profile, variant_id=f"v-{version}-{profile}")


class Fleet:
    """Who signs, and makes bundles of what is signed at the time."""

    def __init__(self, folder: Path) -> None:
        self.repository = TufRepository()
        self.folder = folder
        (folder / "root.json").write_bytes(self.repository.files["1.root.json"])

    def order(self, serial: int, *manifests: Manifest, name: str = "default") -> BundleOrder:
        order = BundleOrder(name, serial, tuple(one.target_path for one in manifests))
        for one in manifests:
            self.repository.add("model.m", one.target_path, manifest_bytes(one))
        self.repository.add("bundles", order.target_path, msgspec.json.encode(order))
        return order

    def bundle(self, file: str, order: BundleOrder, *manifests: Manifest, leave_out: str = "") -> Path:
        current = {one for one in self.repository.files if one != leave_out}
        files = {name: self.repository.files[name] for name in sorted(current)}
        index = BundleIndex(
            1, "f", 1.0, msgspec.Raw(msgspec.json.encode(order)),
            tuple(msgspec.Raw(manifest_bytes(one)) for one in manifests),
            tuple(BundleFile(name, len(body)) for name, body in files.items()), (),
        )  # fmt: skip
        bodies = {INDEX: msgspec.json.encode(index)}
        bodies |= {f"metadata/{number}": body for number, body in enumerate(files.values())}
        members = [write_header(name, len(body), 0) + body + bytes(padding(len(body))) for name, body in bodies.items()]
        path = self.folder / f"{file}.shoal-bundle"
        path.write_bytes(b"".join(members) + END)
        return path


class Device:
    """A supervisor's loop in small; nobody else uses the trusted metadata."""

    connected = True

    def __init__(self, folder: Path, *, root: bool = True, **sources: Any) -> None:
        config = Config(
            "d", folder / "state", root_file=str(folder / "root.json") if root else "",
            sources=SourceConfig(offline=True, **sources),
        )  # fmt: skip
        config.state_dir.mkdir(exist_ok=True)
        self.ordered: list[list[DesiredDeployment]] = []
        self._words: queue.Queue[Any] = queue.Queue()
        self._journal = Journal(config.state_dir / "journal.db")
        self.bundles = Bundles(
            config, self._journal, self._words.put, turn=self, profiles=set, order=self.ordered.append,
        )  # fmt: skip

    def see(self, *paths: Path) -> None:
        self.bundles.seen(BundlesSeen(tuple(open_bundle(path) for path in paths)).bundles)

    def turn(self, until: Callable[[], object], *, seconds: float = 60.0, hurry: float = 1.0) -> bool:
        start = time.monotonic()
        while not until():
            passed = time.monotonic() - start
            if passed > seconds:
                return False
            self.bundles.tick(start + passed * hurry)
            try:
                self.bundles.said(self._words.get(timeout=0.02), start + passed * hurry)
            except queue.Empty:
                continue
        return True

    def versions(self) -> list[list[str]]:
        return [[one.read_manifest().version for one in order] for order in self.ordered]

    def stop(self) -> None:
        self.bundles.stop()
        self._journal.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def refused(device: Device, caplog: pytest.LogCaptureFixture, code: str) -> None:
    caplog.clear()
    assert device.turn(lambda: f"is refused ({code})" in caplog.text)
    assert not device.ordered


def test_an_order_is_carried_out_once(fleet: Fleet, tmp_path: Path) -> None:
    path = fleet.bundle("one", fleet.order(1, of("1")), of("1"))
    device = Device(tmp_path)
    device.see(path)
    assert device.turn(lambda: device.ordered)
    (only,) = device.ordered[0]
    assert (only.read_manifest(), bytes(only.manifest)) == (of("1"), manifest_bytes(of("1")))
    assert only.deployment_id.startswith("bundle:default:")
    device.stop()
    again = Device(tmp_path)
    again.see(path)
    assert not again.turn(lambda: again.ordered, seconds=2.0), "also not after a restart"
    again.stop()


def test_an_older_stick_takes_nothing_back(fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever signed the older order can't change what came after: by its metadata it is a rollback."""
    old = fleet.bundle("old", fleet.order(5, of("1")), of("1"))
    new_order = fleet.order(6, of("2"))
    new = fleet.bundle("new", new_order, of("2"))
    device = Device(tmp_path)
    device.see(new)
    assert device.turn(lambda: device.ordered)
    assert device.versions() == [["2"]]
    device.ordered.clear()
    device.stop()
    forgetful = Device(tmp_path)
    forgetful._journal.keep_number("bundle_serial:default", 0)  # the journal was lost: metadata still knows better
    forgetful.see(old)
    refused(forgetful, caplog, "untrusted")
    # An old order beside the newest metadata: nobody may pick of what was ever signed.
    picked = fleet.bundle("picked", BundleOrder("default", 5, (of("1").target_path,)), of("1"))
    forgetful.see(picked)
    refused(forgetful, caplog, "untrusted")
    forgetful.stop()


def test_a_device_follows_its_own_order_alone(fleet: Fleet, tmp_path: Path) -> None:
    theirs = fleet.order(1, of("2"), name="line-b")
    path = fleet.bundle("theirs", theirs, of("2"))
    device = Device(tmp_path)
    device.see(path)
    assert not device.turn(lambda: device.ordered, seconds=1.5)
    device.stop()
    other = Device(tmp_path, bundle="line-b")
    other.see(path)
    assert other.turn(lambda: other.ordered)
    other.stop()


def test_what_nobody_signed(fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = fleet.order(1, of("1"))
    device = Device(tmp_path)
    device.see(fleet.bundle("forged", msgspec.structs.replace(order, serial=9), of("1")))
    refused(device, caplog, "untrusted")
    unknown = BundleOrder("default", 9, (of("2").target_path,))
    device.see(fleet.bundle("unknown", unknown, of("2")))
    refused(device, caplog, "untrusted")
    device.stop()


def test_without_a_trusted_root_nothing_counts(fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No stick is trusted because it came first, though the configured broker is on this machine."""
    path = fleet.bundle("one", fleet.order(1, of("1")), of("1"))
    device = Device(tmp_path, root=False)
    device.see(path)
    refused(device, caplog, "no_trusted_root")
    device.stop()


@pytest.mark.parametrize(("days", "counts"), [(90.0, True), (5.0, False)])
def test_metadata_that_expired_on_the_way_counts_for_a_while(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture, days: float, counts: bool
) -> None:
    order = fleet.order(1, of("1"))
    ended = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=10)
    fleet.repository.timestamp.expires = fleet.repository.snapshot.expires = ended
    fleet.repository.publish()
    device = Device(tmp_path, days=days)
    device.see(fleet.bundle("late", order, of("1")))
    if counts:
        assert device.turn(lambda: device.ordered)
    else:
        refused(device, caplog, "metadata_expired")
    device.stop()


def test_one_without_all_its_metadata_is_given_up(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = fleet.order(1, of("1"))
    lacking = fleet.bundle("lacking", order, of("1"), leave_out="timestamp.json")
    whole = fleet.bundle("whole", order, of("1"))
    device = Device(tmp_path)
    with caplog.at_level(logging.INFO):
        device.see(lacking)
        assert device.turn(lambda: "is not complete" in caplog.text, hurry=60.0)
        device.see(lacking, whole)
        assert device.turn(lambda: device.ordered, hurry=10.0), "the next one gets its turn"
    device.stop()


def test_of_several_profiles_the_devices_own(fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = (of("1", "rpi"), of("2", "x86"))
    path = fleet.bundle("both", fleet.order(1, *both), *both)
    unsure = Device(tmp_path)
    unsure.see(path)
    assert unsure.turn(lambda: "bundles.profile" in caplog.text)
    assert not unsure.ordered
    unsure.stop()
    sure = Device(tmp_path, profile="x86")
    sure.see(path)
    assert sure.turn(lambda: sure.ordered)
    assert sure.versions() == [["2"]]
    sure.stop()
