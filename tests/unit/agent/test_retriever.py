"""The best encoding first, each at most once, and at the end the artifact as it is; with the real decoding process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.protocol.delta import COPY, DELTA, LITERAL, ZSTD
from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Encoding
from agent.protocol.topics import ParsedChunkTopic
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.retriever import SILENT_S, Retriever
from agent.update.store import ArtifactStore
from agent.update.updater import Record, Updater
from tests.delta_files import frame, operation
from tests.unit.agent.test_fetcher import Link, Waiting
from tests.unit.agent.test_store_and_download import CHUNK, chunks, manifest

OLD = bytes(range(200)) * 3
NEW = OLD[:500] + b"end" + OLD[500:]
DIFFERENCE = frame(operation(COPY, 500) + operation(LITERAL, 3, b"end") + operation(COPY, 100))
PACKED = frame(NEW)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def encoding(content: bytes, codec: str, base: bytes = b"") -> Encoding:
    return Encoding(codec, digest_of(content), len(content), CHUNK, digest_of(base) if base else "")


class World:
    """A device that holds OLD and is to get NEW; its journal and its store outlive its restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.owner, self.now = folder, Waiting(), 0.0
        self.journal = Journal(folder / "journal.db")
        self.contents = {digest_of(one): one for one in (NEW, DIFFERENCE, PACKED)}
        self.start()
        (folder / "artifacts" / digest_of(OLD)).write_bytes(OLD)

    def start(self) -> None:
        self.link, self.store = Link(), ArtifactStore(self.folder / "artifacts")
        self.fetcher = Fetcher(self.store, self.link, "here")
        self.retriever = Retriever(self.store, self.fetcher, self.link, self.save)

    def save(self, record: Record) -> None:
        self.journal.save({record.deployment_id: record})
        self.store.collect_garbage(Updater({"one": record}, 1).kept_digests() | {digest_of(OLD)})

    def record(self, *encodings: Encoding) -> Record:
        record = Record("one", manifest(NEW), 1.0, 60.0, Phase.DOWNLOADING, encodings=encodings)
        self.save(record)
        return record

    def begin(self, record: Record) -> None:
        self.retriever.begin(record, self.owner, self.now)

    def wanted(self) -> str:
        return next(iter(self.link.listening), "")

    def deliver(self) -> None:
        """Every chunk of what is asked for now."""
        digest = self.wanted()
        for index, piece in enumerate(chunks(self.contents[digest])):
            self.fetcher.chunk(ParsedChunkTopic(digest, index, None), piece, self.now)

    def settle(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not until() and time.monotonic() < deadline:
            self.retriever.tick(self.now)
            time.sleep(0.02)
        assert until()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_difference_makes_the_artifact(world: World) -> None:
    record = world.record(encoding(DIFFERENCE, DELTA, OLD), encoding(PACKED, ZSTD))
    world.begin(record)
    assert world.wanted() == digest_of(DIFFERENCE)
    world.deliver()
    world.settle(lambda: world.owner.came)
    assert world.store.path(digest_of(NEW)).read_bytes() == NEW
    assert (world.owner.bytes, record.encoding) == (len(DIFFERENCE), DELTA)
    assert world.journal.load()["one"].encoding == DELTA
    assert not list(world.store.path("x").parent.glob("*.one"))


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (encoding(DIFFERENCE, "delta-9", OLD), "a codec that is not known"),
        (encoding(DIFFERENCE, DELTA, b"another"), "a base that it does not hold"),
        (encoding(NEW + b"more", ZSTD), "larger than the artifact"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_does_not_fit_is_passed_over(world: World, first: Encoding, why: str) -> None:
    world.begin(world.record(first, encoding(PACKED, ZSTD)))
    assert world.wanted() == digest_of(PACKED), why


WRONG = {
    "no frame": b"rubbish" * 9,
    "wrong operations": frame(operation(COPY, 700)),
    "another result": frame(operation(COPY, 500) + operation(LITERAL, 3, b"END") + operation(COPY, 100)),
    "too short": frame(operation(COPY, 500)),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_one_that_does_not_decode_is_followed_by_the_next_and_at_last_by_the_artifact(
    world: World, content: bytes
) -> None:
    world.contents[digest_of(content)] = content
    broken = b"broken too" * 5
    world.contents[digest_of(broken)] = broken
    record = world.record(encoding(content, DELTA, OLD), encoding(broken, ZSTD))
    world.begin(record)
    world.deliver()
    world.settle(lambda: world.wanted() == digest_of(broken))
    world.deliver()
    world.settle(lambda: world.wanted() == digest_of(NEW))
    world.deliver()
    world.settle(lambda: world.owner.came)
    assert world.owner.bytes == len(content) + len(broken) + len(NEW)
    assert (record.encoding, world.owner.failed) == ("", [])
    assert set(world.journal.load()["one"].failed_encodings) == {digest_of(content), digest_of(broken)}


def test_one_whose_bytes_were_damaged_on_the_way_is_not_asked_for_again(world: World) -> None:
    record = world.record(encoding(DIFFERENCE, DELTA, OLD))
    world.begin(record)
    world.contents[digest_of(DIFFERENCE)] = bytes(len(DIFFERENCE))
    world.deliver()
    assert world.wanted() == digest_of(NEW)
    world.fetcher.stop()
    world.start()
    world.begin(world.journal.load()["one"])
    assert world.wanted() == digest_of(NEW)


def test_a_base_that_was_damaged_is_no_base(world: World) -> None:
    world.begin(world.record(encoding(DIFFERENCE, DELTA, OLD)))
    world.store.path(digest_of(OLD)).write_bytes(OLD[:-1] + b"x")
    world.deliver()
    assert world.wanted() == digest_of(NEW)
    assert not world.store.has(digest_of(OLD))


def test_decoding_that_ends_the_agent_each_time_is_begun_twice(world: World) -> None:
    world.begin(world.record(encoding(DIFFERENCE, DELTA, OLD)))
    world.deliver()
    for _ in range(2):
        world.retriever.stop()
        world.fetcher.stop()
        world.start()
        world.begin(world.journal.load()["one"])
    assert world.wanted() == digest_of(NEW)


def test_one_that_the_server_does_not_send_is_given_up_but_not_while_there_is_no_link(world: World) -> None:
    world.begin(world.record(encoding(DIFFERENCE, DELTA, OLD)))
    world.link.connected = False
    for world.now in range(1, 1000, 10):
        world.retriever.tick(world.now)
    assert world.wanted() == digest_of(DIFFERENCE)
    world.link.connected = True
    world.retriever.tick(world.now)
    world.now += SILENT_S + 1
    world.retriever.tick(world.now)
    assert world.wanted() == digest_of(NEW)


def test_one_that_is_not_wanted_any_more_is_not_decoded(world: World) -> None:
    world.begin(world.record(encoding(DIFFERENCE, DELTA, OLD)))
    world.deliver()
    world.retriever.cancel("one")
    world.retriever.tick(1.0)
    assert not world.wanted()
    assert not world.owner.came


def test_when_nothing_comes_at_all_the_owner_is_told(world: World) -> None:
    world.begin(world.record(encoding(DIFFERENCE, DELTA, OLD)))
    world.fetcher.tick(61.0)
    assert world.wanted() == digest_of(NEW)
    world.retriever.tick(61.0)
    world.fetcher.tick(200.0)
    assert world.owner.failed == [("one", WireErrorCode.DOWNLOAD_STALLED)]


def test_the_base_stays_while_a_difference_to_it_is_fetched(world: World) -> None:
    record = world.record(encoding(DIFFERENCE, DELTA, OLD))
    updater = Updater({"one": record}, 1)
    assert {digest_of(OLD), digest_of(DIFFERENCE), digest_of(NEW)} == updater.kept_digests()
    record.failed_encodings = (digest_of(DIFFERENCE),)
    assert updater.kept_digests() == {digest_of(NEW)}
    record.failed_encodings, record.phase = (), Phase.LOADING
    assert updater.kept_digests() == {digest_of(NEW)}


def test_an_encoding_with_the_digest_of_what_serves_removes_nothing(world: World) -> None:
    world.begin(world.record(encoding(OLD, ZSTD)))
    world.settle(lambda: world.wanted() == digest_of(NEW))
    assert world.store.path(digest_of(OLD)).read_bytes() == OLD


def test_of_an_encoding_that_failed_nothing_stays(world: World) -> None:
    broken = b"rubbish" * 9
    world.contents[digest_of(broken)] = broken
    world.begin(world.record(encoding(broken, ZSTD)))
    world.deliver()
    world.settle(lambda: world.wanted() == digest_of(NEW))
    names = {path.name.partition(".")[0] for path in world.store.path("x").parent.iterdir()}
    assert names == {digest_of(OLD), digest_of(NEW)}
