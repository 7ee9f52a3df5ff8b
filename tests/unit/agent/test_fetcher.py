"""One download a digest, however many want it; what came counts, and whoever wants it is told how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import Need
from agent.protocol.topics import ParsedChunkTopic
from agent.update.fetcher import Fetcher
from agent.update.store import ArtifactStore
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

    def received(self, key: str, count: int) -> None:
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
