"""One download a digest, however many want it; what came counts, and whoever wants it is told how it ended."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from agent.protocol import delivery
from agent.protocol.delivery import Budget, DeliveryPolicy, Period, read_window
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import LinkFacts
from agent.protocol.messages import Need
from agent.protocol.topics import ParsedChunkTopic
from agent.update.fetcher import Fetcher, Kept
from agent.update.pace import OwnLimits, Pacer
from agent.update.store import SYNCED, WRITTEN, ArtifactStore
from agent.update.zones import zone_of
from tests.unit.agent.test_store_and_download import chunks, manifest

CONTENT = bytes(range(40))


class Link:
    def __init__(self) -> None:
        self.connected = True
        self.listening: set[str] = set()
        self.needs: list[Need] = []

    def listen_to_broadcast(self, digest: str) -> None:
        self.listening.add(digest)

    def stop_listening(self, digest: str) -> None:
        self.listening.remove(digest)

    def say_need(self, need: Need) -> None:
        self.needs.append(need)


class Waiting:
    def __init__(self) -> None:
        self.came: list[str] = []
        self.held: list[object] = []
        self.failed: list[tuple[str, WireErrorCode]] = []
        self.bytes = 0

    def received(self, key: str, count: int, source: str) -> None:
        self.bytes += count

    def waits(self, key: str, waiting: object) -> None:
        self.held.append(waiting)

    def fetched(self, key: str) -> None:
        self.came.append(key)

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        self.failed.append((key, code))


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def fetcher(tmp_path: Path, link: Link) -> Fetcher:
    return Fetcher(ArtifactStore(tmp_path / "artifacts"), link, str(tmp_path))


def send(fetcher: Fetcher, content: bytes, digest: str = "") -> None:
    for index, piece in enumerate(chunks(content)):
        fetcher.chunk(ParsedChunkTopic(digest or manifest(content).digest, index, None), piece, 1.0)


def test_two_who_want_the_same_share_one_download(fetcher: Fetcher, link: Link) -> None:
    one, two = Waiting(), Waiting()
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.begin("b", manifest(CONTENT), two, deadline_s=60, now=0.0)
    fetcher.tick(0.0)
    assert len(link.needs) == 1
    send(fetcher, CONTENT)
    assert (one.came, two.came) == (["a"], ["b"])
    assert one.bytes == len(CONTENT)
    assert not link.listening
    late = Waiting()
    fetcher.begin("c", manifest(CONTENT), late, deadline_s=60, now=2.0)
    assert late.came == ["c"]


def test_chunks_are_written_where_they_are_read_and_reckoned_with_later(fetcher: Fetcher, link: Link) -> None:
    """It is complete when it was told so, not when the last chunk was written: every byte is counted."""
    one, topic = Waiting(), partial(ParsedChunkTopic, manifest(CONTENT).digest)
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    pieces = chunks(CONTENT)
    with ThreadPoolExecutor(4) as readers:
        kept = list(
            readers.map(lambda index: fetcher.keep(topic(index, None), pieces[index]), [*range(len(pieces))] * 2)
        )
    assert sum(one.index is not None for one in kept if one is not None) == len(pieces)
    told = 0
    for said in kept:
        assert said is not None
        assert one.came == ([] if told < len(pieces) else ["a"])
        fetcher.kept(said, 1.0)
        told += said.index is not None
    assert one.bytes >= len(CONTENT)
    assert fetcher.keep(topic(0, None, (1,)), b"") is None


def test_what_was_written_of_a_download_that_ended_counts_once(fetcher: Fetcher) -> None:
    one, topic = Waiting(), ParsedChunkTopic(manifest(CONTENT).digest, 0, None)
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    late = fetcher.keep(topic, chunks(CONTENT)[0])
    assert late is not None
    fetcher.cancel("a")
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.kept(late, 0.0)
    found = fetcher.progress("a")
    assert found is not None
    assert found.left == found.part.missing == len(chunks(CONTENT)) - 1
    fetcher.cancel("a")
    assert fetcher.keep(topic, b"") == Kept(0)


def test_what_came_is_synced_every_few_seconds_whether_more_comes_or_not(
    fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, digest = Waiting(), manifest(CONTENT).digest
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.chunk(ParsedChunkTopic(digest, 0, None), chunks(CONTENT)[0], 0.1)
    marks = tmp_path / "artifacts" / f"{digest}.have"
    for now, state in ((1.0, WRITTEN), (5.5, SYNCED)):
        fetcher.tick(now)
        assert marks.read_bytes()[0] == state
    fetcher.chunk(ParsedChunkTopic(digest, 1, None), chunks(CONTENT)[1], 6.0)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fdatasync", full)
    fetcher.tick(7.0)
    assert not one.failed
    fetcher.tick(11.0)
    assert one.failed == [("a", WireErrorCode.DISK_FULL)]


def test_the_download_goes_on_while_one_still_wants_it(fetcher: Fetcher, link: Link) -> None:
    one, two = Waiting(), Waiting()
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.begin("b", manifest(CONTENT), two, deadline_s=60, now=0.0)
    fetcher.cancel("a")
    assert link.listening
    send(fetcher, CONTENT)
    assert (one.came, two.came) == ([], ["b"])
    fetcher.begin("a", manifest(b"other"), one, deadline_s=60, now=0.0)
    fetcher.cancel("a")
    assert not link.listening


def test_damaged_bytes_are_gone_and_the_owner_is_told_to_look(fetcher: Fetcher, tmp_path: Path) -> None:
    one = Waiting()
    fetcher.begin("a", manifest(CONTENT, digest="f" * 64), one, deadline_s=60, now=0.0)
    send(fetcher, CONTENT, "f" * 64)
    assert one.came == ["a"]
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_download_that_stalls_is_given_up(fetcher: Fetcher, link: Link) -> None:
    one = Waiting()
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.tick(59.0)
    assert not one.failed
    fetcher.tick(61.0)
    assert one.failed == [("a", WireErrorCode.DOWNLOAD_STALLED)]
    assert not link.listening
    assert fetcher.progress("a") is None


def test_a_store_that_can_not_be_written_is_told(tmp_path: Path, link: Link) -> None:
    folder = tmp_path / "artifacts"
    fetcher = Fetcher(ArtifactStore(folder), link, str(tmp_path))
    (folder / f"{manifest(CONTENT).digest}.part").mkdir()
    one = Waiting()
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    assert one.failed == [("a", WireErrorCode.STORE_ERROR)]


def test_what_came_before_a_restart_counts(fetcher: Fetcher, tmp_path: Path, link: Link) -> None:
    one = Waiting()
    fetcher.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    fetcher.chunk(ParsedChunkTopic(manifest(CONTENT).digest, 0, None), chunks(CONTENT)[0], 0.0)
    fetcher.stop()
    again = Fetcher(ArtifactStore(tmp_path / "artifacts"), link, str(tmp_path))
    again.begin("a", manifest(CONTENT), one, deadline_s=60, now=0.0)
    found = again.progress("a")
    assert found is not None
    assert found.part.missing == len(chunks(CONTENT)) - 1


WINDOWS = DeliveryPolicy(download=(read_window("01:00-02:00 UTC"),))


class Clock:
    """Half past midnight, UTC."""

    now = 1800.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paced(tmp_path: Path, link: Link, clock: Clock) -> Fetcher:
    own = OwnLimits(budgets={"cellular": (Budget(24, Period.HOUR),)})
    pacer = Pacer(own=own, zones=zone_of, clock=clock)
    pacer.set_link(LinkFacts("cellular", metered=True))
    return Fetcher(ArtifactStore(tmp_path / "artifacts"), link, str(tmp_path), pacer=pacer)


def test_outside_its_window_a_download_neither_listens_nor_asks_and_does_not_stall(
    paced: Fetcher, link: Link, clock: Clock
) -> None:
    owner = Waiting()
    paced.begin("one", manifest(CONTENT), owner, deadline_s=100.0, now=0.0, delivery=WINDOWS)
    for now in range(1799):
        paced.tick(float(now))
        clock.now = 1800.0 + now
    assert link.listening == set()
    assert [need.missing for need in link.needs] == [()]
    assert isinstance(owner.held[-1], delivery.Waiting)
    assert owner.held[-1].until == 3600.0
    assert owner.failed == []
    clock.now = 3600.0
    paced.tick(1800.0)
    assert owner.held[-1] is None
    assert link.needs[-1].missing != ()


def test_a_new_policy_lets_a_download_go_on(paced: Fetcher, link: Link) -> None:
    owner = Waiting()
    paced.begin("one", manifest(CONTENT), owner, deadline_s=100.0, now=0.0, delivery=WINDOWS)
    paced.begin("one", manifest(CONTENT), owner, deadline_s=100.0, now=0.0)
    paced.tick(1.0)
    assert owner.held[-1] is None
    assert link.needs[-1].missing != ()


def test_a_budget_counts_what_comes_wanted_or_not_and_stops_the_download(paced: Fetcher, link: Link) -> None:
    owner = Waiting()
    paced.begin("one", manifest(CONTENT), owner, deadline_s=100.0, now=0.0)
    paced.tick(0.0)
    assert link.needs[-1].alone
    assert link.listening == set()
    paced.chunk(ParsedChunkTopic("f" * 64, 0, None), bytes(8), 0.1)
    assert owner.held == []
    paced.chunk(ParsedChunkTopic(manifest(CONTENT).digest, 0, None), chunks(CONTENT)[0], 0.2)
    paced.chunk(ParsedChunkTopic(manifest(CONTENT).digest, 0, None), chunks(CONTENT)[0], 0.3)
    paced.tick(0.4)
    assert isinstance(owner.held[-1], delivery.Waiting)
    assert owner.held[-1].reason is delivery.WaitingFor.BUDGET
    assert link.needs[-1].missing == ()


def test_where_several_want_it_one_that_may_is_enough(paced: Fetcher, link: Link) -> None:
    held, free = Waiting(), Waiting()
    paced.begin("held", manifest(CONTENT), held, deadline_s=100.0, now=0.0, delivery=WINDOWS)
    paced.begin("free", manifest(CONTENT), free, deadline_s=100.0, now=0.0)
    paced.tick(1.0)
    assert held.held[-1] is None
    assert link.needs[-1].missing != ()


def test_a_combination_gives_the_one_chunk_that_lacks(fetcher: Fetcher, link: Link) -> None:
    owner, pieces, digest = Waiting(), chunks(CONTENT), manifest(CONTENT).digest
    fetcher.begin("one", manifest(CONTENT), owner, deadline_s=100.0, now=0.0)
    last = len(pieces) - 1
    value = 0
    for piece in (pieces[0], pieces[1], pieces[last]):
        value ^= int.from_bytes(piece, "little")
    combined = value.to_bytes(len(pieces[0]), "little")
    topic = ParsedChunkTopic(digest, 0, None, (1, last))
    fetcher.chunk(topic, combined, 0.0)  # of no use yet: all three lack
    for index in (*range(1, last),):
        fetcher.chunk(ParsedChunkTopic(digest, index, None), pieces[index], 0.0)
    for wrong in ((1, 1), (1, 4000), (0, 1)):
        fetcher.chunk(ParsedChunkTopic(digest, 0, None, wrong), combined, 0.0)
    fetcher.chunk(ParsedChunkTopic(digest, last, None), pieces[last], 0.0)
    assert owner.came == []
    fetcher.chunk(topic, combined, 0.0)
    assert owner.came == ["one"]
