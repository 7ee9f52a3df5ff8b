"""What is published: chunks and their combinations, each read once, within the server's rate."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.protocol.delivery import Budget, DeliveryPolicy, Period, Window
from agent.protocol.limits import LIMITS
from agent.protocol.messages import ChunkRange, Need
from agent.protocol.topics import ParsedChunkTopic, parse_chunk_topic
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.devices.delivery import Delivery as Policy
from fleet_server.devices.delivery import combined, without_windows
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.streamer import Send

CHUNK = LIMITS.chunk_bytes


class CountingStore:
    """A store that counts how often it is read."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.reads = 0

    def read_range(self, digest: str, start: int, length: int) -> bytes:
        self.reads += 1
        return self._store.read_range(digest, start, length)


class Broker:
    def __init__(self) -> None:
        self.sent: list[tuple[ParsedChunkTopic, bytes]] = []

    def publish(self, topic: str, payload: bytes) -> bool:
        self.sent.append((parse_chunk_topic(topic), payload))
        return True


@pytest.fixture
def content(tmp_path: Path) -> tuple[CountingStore, str, bytes]:
    data = bytes(range(256)) * 1024 * 5 + b"end"
    (tmp_path / "file").write_bytes(data)
    store = ArtifactStore.open(None, folder=tmp_path / "store")
    digest, _ = store.put_file(tmp_path / "file")
    return CountingStore(store), digest, data


def run(delivery: Delivery, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        delivery.step()


def test_chunks_are_published_whole_and_spans_beyond_the_end_are_cut_off(
    content: tuple[CountingStore, str, bytes],
) -> None:
    store, digest, data = content
    broker = Broker()
    delivery = Delivery(store, broker.publish, None)  # type: ignore[arg-type]
    for device in ("one", "two", "three"):
        delivery.hear(device, Need(digest, "d", (ChunkRange(0, 1 << 23),)), 6)
    run(delivery, 0.5)
    assert [topic.chunk for topic, _ in broker.sent] == list(range(6))
    assert b"".join(payload for _, payload in broker.sent) == data
    assert {topic.device_id for topic, _ in broker.sent} == {None}
    assert store.reads == 6
    for device in ("one", "two", "three"):
        delivery.forget(device)


def test_a_combination_is_the_exclusive_or_filled_up_with_zeros(content: tuple[CountingStore, str, bytes]) -> None:
    store, digest, data = content
    broker = Broker()
    delivery = Delivery(store, broker.publish, None)  # type: ignore[arg-type]
    delivery._send(Send(digest, (0, 3, 5), None))
    ((topic, payload),) = broker.sent
    assert (topic.chunk, topic.others) == (0, (3, 5))
    assert len(payload) == CHUNK
    assert payload[:3] == bytes(a ^ b ^ c for a, b, c in zip(data[:3], data[3 * CHUNK :][:3], b"end", strict=True))
    assert payload[3:] == bytes(CHUNK - 3)  # chunks 0 and 3 are alike


def test_the_server_keeps_to_its_rate(content: tuple[CountingStore, str, bytes]) -> None:
    store, digest, _ = content
    broker = Broker()
    delivery = Delivery(store, broker.publish, CHUNK * 2.0)  # type: ignore[arg-type]
    delivery.hear("one", Need(digest, "d", (ChunkRange(0, 5),)), 6)
    run(delivery, 1.2)
    assert 2 <= len(broker.sent) <= 5  # two at once, then two a second


def test_a_policy_as_people_write_it_is_what_devices_are_told() -> None:
    policy = Policy(rate="2 MB/s", budgets={"cellular": "50 MB per day"}, download=["Sat 01:00-02:00 UTC"]).policy()
    cellular = (Budget(50_000_000, Period.DAY),)
    assert policy == DeliveryPolicy(2_000_000, {"cellular": cellular}, (Window((5,), 60, 120, "UTC"),))


def test_the_stricter_of_profile_and_rollout_holds_but_windows_are_the_rollouts() -> None:
    general = Policy(
        rate="2 MB/s", budgets={"cellular": "50 MB per day"}, download=["01:00-02:00"], activate=["03:00-04:00"]
    )
    special = Policy(rate="3 MB/s", budgets={"cellular": "10 MB per hour"}, download=["00:00-24:00"])
    both = combined(general.policy(), special.policy())
    assert both.rate == 2_000_000
    assert both.budgets["cellular"] == (Budget(50_000_000, Period.DAY), Budget(10_000_000, Period.HOUR))
    assert both.download == special.policy().download
    assert both.activate == general.policy().activate
    assert without_windows(both) == DeliveryPolicy(both.rate, both.budgets)
