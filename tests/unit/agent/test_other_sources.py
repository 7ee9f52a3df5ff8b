"""The fetcher with other sources beside MQTT: who brings what, what the server is told, and how lies end."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import Config
from agent.peers.server import PeerServer
from agent.protocol.delivery import DeliveryPolicy, Waiting, WaitingFor
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Encoding, Manifest
from agent.protocol.messages import SourceNeed, SourceOffer
from agent.protocol.topics import ParsedChunkTopic
from agent.source_config import SourceConfig, SourceKind
from agent.update.bundle_file import Held
from agent.update.download import Allowance
from agent.update.fetcher import Fetcher
from agent.update.other_sources import OtherSources
from agent.update.pace import Pacer
from agent.update.retriever import Retriever
from agent.update.source_tls import Credentials
from agent.update.sources import MQTT_SILENT_S, Nearness
from agent.update.store import ArtifactStore
from agent.update.transfer import TransferEnded
from agent.update.updater import Record
from tests.unit.agent.test_fetcher import Link
from tests.unit.agent.test_store_and_download import chunks, manifest

CONTENT = bytes(range(200)) * 5


class Owner:
    def __init__(self) -> None:
        self.came = 0
        self.failed: list[str] = []
        self.sources: dict[str, int] = {}
        self.waiting: Waiting | None = None

    def waits(self, key: str, waiting: Waiting | None) -> None:
        self.waiting = waiting

    def received(self, key: str, count: int, source: str) -> None:
        self.sources[source] = self.sources.get(source, 0) + count

    def fetched(self, key: str) -> None:
        self.came += 1

    def fetch_failed(self, key: str, code: object, detail: str) -> None:
        self.failed.append(detail)


class Gate(Pacer):
    """Lets nothing in while there is something to wait for."""

    waiting: Waiting | None = None

    def download(self, policy: DeliveryPolicy, chunk_size: int, now: float) -> Allowance | Waiting:
        return self.waiting or super().download(policy, chunk_size, now)


class Device:
    """A supervisor's loop in small, whose clock a test moves."""

    def __init__(self, folder: Path, **sources: Any) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.link, self.owner, self.now = Link(), Owner(), 1000.0
        self.asked: list[SourceNeed] = []
        config = Config("d", folder / "state", sources=SourceConfig(**sources))
        self.others = OtherSources(config, self.link, self.events.put, self.asked.append, Credentials(config))
        self.store, self.pacer = ArtifactStore(folder / "artifacts"), Gate()
        self.fetcher = Fetcher(self.store, self.link, str(folder), others=self.others, pacer=self.pacer)

    def begin(self, content: Manifest, **options: Any) -> None:
        self.fetcher.begin("a", content, self.owner, deadline_s=1e6, now=self.now, **options)

    def turn(self, *, seconds: float = 0.0, real_s: float = 5.0, until: Any = None) -> None:
        """Ticks until something holds (by default that the content came), as the clock goes on."""
        done = until or (lambda: self.owner.came)
        deadline = time.monotonic() + real_s
        self.now += seconds
        while not done() and time.monotonic() < deadline:
            self.fetcher.tick(self.now)
            try:
                event = self.events.get(timeout=0.05)
            except queue.Empty:
                self.now += 0.1
                continue
            if isinstance(event, TransferEnded):
                self.others.ended(event, self.now)
            else:
                self.fetcher.source_chunk(event, self.now)

    def by_mqtt(self, content: Manifest, data: bytes = CONTENT) -> None:
        for index, piece in enumerate(chunks(data)):
            self.fetcher.chunk(ParsedChunkTopic(content.digest, index, None), piece, self.now)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[tuple[PeerServer, Path]]:
    """A peer with one file, whatever artifact it is asked for."""
    path = tmp_path / "theirs"
    path.write_bytes(CONTENT)
    server = PeerServer("127.0.0.1:0", 100.0, lambda _: Held(path, 0, path.stat().st_size), None, "")
    yield server, path
    server.stop()


def test_a_peer_brings_it_and_the_server_is_not_asked(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    place = f"127.0.0.1:{peer[0].port}"
    device = Device(tmp_path, peers=(place,))
    device.begin(manifest(CONTENT))
    device.turn()
    assert device.store.verify(manifest(CONTENT).digest)
    assert device.owner.sources == {f"peer {place}": len(CONTENT)}
    assert not device.link.needs


def test_nobody_there_and_mqtt_goes_on_at_once(tmp_path: Path) -> None:
    device = Device(tmp_path, peers=("127.0.0.1:1",), mirrors=("http://127.0.0.1:1/{digest}",))
    device.begin(manifest(CONTENT))
    device.turn(until=lambda: device.link.needs)
    device.by_mqtt(manifest(CONTENT))
    assert device.owner.came == 1
    assert list(device.owner.sources) == ["mqtt"]


def test_what_lies_is_asked_no_more(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    """The second try is the server's alone, though the peer is there and comes first."""
    server, path = peer
    path.write_bytes(b"x" * len(CONTENT))
    device = Device(tmp_path, peers=(f"127.0.0.1:{server.port}",))
    device.begin(manifest(CONTENT))
    device.turn()
    assert not device.store.has(manifest(CONTENT).digest)
    device.owner.came = 0
    device.begin(manifest(CONTENT), server_only=True)
    device.turn(until=lambda: device.link.needs)
    device.turn(seconds=60.0, real_s=0.5)
    assert device.owner.came == 0
    device.by_mqtt(manifest(CONTENT))
    assert device.store.verify(manifest(CONTENT).digest)


def test_the_server_hears_when_another_source_takes_over(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    """Or it would send on, for two minutes, what nobody lacks."""
    device = Device(tmp_path, mirrors=(f"http://127.0.0.1:{peer[0].port}/shoal/v1/artifacts/{{digest}}",))
    device.begin(manifest(CONTENT))
    device.turn(until=lambda: device.link.needs)
    assert device.link.needs[0].missing
    device.fetcher.chunk(ParsedChunkTopic(manifest(CONTENT).digest, 0, None), chunks(CONTENT)[0], device.now)
    device.turn(seconds=MQTT_SILENT_S)
    assert device.owner.came == 1
    assert device.link.needs[-1].missing == ()
    assert set(device.owner.sources) == {"mqtt", f"mirror 127.0.0.1:{peer[0].port}/shoal/v1/artifacts"}
    assert device.owner.sources["mqtt"] == len(chunks(CONTENT)[0])


def test_https_is_asked_for_when_mqtt_falls_silent(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    device = Device(tmp_path)
    digest = manifest(CONTENT).digest
    device.begin(manifest(CONTENT))
    device.turn(until=lambda: device.link.needs)
    assert not device.asked, "while MQTT may bring it nobody asks"
    device.turn(seconds=MQTT_SILENT_S, until=lambda: device.asked)
    assert device.asked == [SourceNeed(digest)]
    url = f"http://127.0.0.1:{peer[0].port}/shoal/v1/artifacts/{digest}"
    device.others.offered(SourceOffer("f" * 64, url, "t", 900.0), device.now)
    device.others.offered(SourceOffer(digest, url, "t", 900.0), device.now)
    device.turn()
    assert device.owner.sources == {"https": len(CONTENT)}


def test_a_server_that_offers_nothing_is_not_asked_all_the_time(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.begin(manifest(CONTENT))
    device.turn(seconds=MQTT_SILENT_S, until=lambda: device.asked)
    device.others.offered(SourceOffer(manifest(CONTENT).digest), device.now)
    for _ in range(50):
        device.now += 10.0
        device.fetcher.tick(device.now)
    assert len(device.asked) == 1


def test_while_nothing_may_come_over_a_network_nobody_is_asked(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    device = Device(tmp_path, peers=(f"127.0.0.1:{peer[0].port}",))
    device.pacer.waiting = Waiting(WaitingFor.BUDGET, "used up")
    device.begin(manifest(CONTENT))
    device.turn(real_s=0.5)
    assert not [need for need in device.link.needs if need.missing]
    assert not device.owner.sources
    assert device.owner.waiting is device.pacer.waiting
    device.pacer.waiting = None
    device.turn()
    assert device.owner.came == 1


def test_one_that_was_cancelled_brings_nothing_any_more(tmp_path: Path, peer: tuple[PeerServer, Path]) -> None:
    device = Device(tmp_path, peers=(f"127.0.0.1:{peer[0].port}",))
    device.begin(manifest(CONTENT))
    device.fetcher.tick(device.now)
    device.fetcher.cancel("a")
    device.turn(real_s=0.5)
    assert (device.owner.came, device.owner.sources) == (0, {})
    assert not device.others._running


def test_found_peers_are_bounded_and_can_go(tmp_path: Path) -> None:
    device = Device(tmp_path)
    for number in range(1000):
        device.others.see_peer(f"n{number}", f"10.0.0.7:{number + 1}")
    assert len(device.others._peers) == 32
    for number in range(1000):
        device.others.see_peer(f"n{number}", None)
    assert not device.others._peers


def test_full_encodings_are_for_those_whom_only_the_server_serves(tmp_path: Path) -> None:
    alone, with_peers = Device(tmp_path / "1"), Device(tmp_path / "2", peers=("10.0.0.7:1",))
    last = Device(tmp_path / "3", peers=("10.0.0.7:1",), order=(SourceKind.MQTT, SourceKind.PEER))
    content = manifest(CONTENT)
    assert [one.fetcher.nearness(content) for one in (alone, with_peers, last)] == [
        Nearness.FAR,
        Nearness.PERHAPS,
        Nearness.FAR,
    ]
    full = Encoding("zstd", "e" * 64, 10, 10)
    record = Record("a", content, 1.0, 60.0, Phase.DOWNLOADING, encodings=(full,))
    difference = msgspec.structs.replace(full, base="b" * 64)
    other = Record("a", content, 1.0, 60.0, Phase.DOWNLOADING, encodings=(full, difference))
    for device, best in ((alone, full), (with_peers, None), (last, full)):
        (device.store.path("b" * 64)).write_bytes(b"old")
        retriever = Retriever(device.store, device.fetcher, device.link, lambda _: None, frozenset({"zstd"}))
        assert retriever._best(record) == best
        assert retriever._best(other) == (best or difference)
