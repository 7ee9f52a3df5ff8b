"""Which peer is asked, what is said to it, and which peers the worker is told of."""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from agent.balancing_config import BalancingConfig, read_balancing
from agent.config import Config
from agent.errors import ConfigError
from agent.identity import identity_folder, load_identity
from agent.peers.balancing import Balancing, takes_peers
from agent.serving.balancing import headers
from agent.serving.balancing.book import ABSENT_S, AT_ONCE, FAILED_S, LONGEST_REST_S, Load, PeerBook
from agent.serving.ipc import TellPeers
from agent.source_config import SourceConfig
from agent.update.source_tls import Credentials
from fleet_server.trust.ca import FleetCa
from tests.unit.agent.test_peers import enrolled

PLACES = ("a:1", "b:1", "c:1")


@pytest.fixture
def book() -> PeerBook:
    found = PeerBook(random.Random(1))
    found.set(PLACES)
    return found


def chosen(book: PeerBook, now: float, *without: str) -> set[str | None]:
    return {book.choose("m", now, without) for _ in range(50)}


def test_whoever_is_expected_to_answer_sooner_is_asked(book: PeerBook) -> None:
    book.answered("a:1", "m", Load(0.5, 0.1), 0.0)
    book.answered("b:1", "m", Load(0.0, 0.2), 0.0)
    assert chosen(book, 0.0, "c:1") == {"b:1"}
    assert chosen(book, 0.45, "c:1") == {"a:1"}, "what waited there is worked off meanwhile"
    book.asked("a:1")
    assert chosen(book, 0.45, "c:1") == {"b:1"}, "one more request is with it"
    book.over("a:1")
    assert chosen(book, 0.45, "c:1") == {"a:1"}
    assert chosen(book, 0.0, *PLACES) == {None}


def test_two_of_many_are_compared(book: PeerBook) -> None:
    """The best of all is not asked by everybody."""
    for number, place in enumerate(PLACES):
        book.answered(place, "m", Load(number / 10, 0.01), 0.0)
    assert chosen(book, 0.0) == {"a:1", "b:1"}, "all but the worst"


def test_a_peer_that_is_full_rests_until_that_is_worked_off(book: PeerBook) -> None:
    book.set(("a:1",))
    book.full("a:1", "m", Load(0.2, 0.1), 1.0)
    assert (book.choose("m", 1.19), book.choose("m", 1.21)) == (None, "a:1")
    book.full("a:1", "m", Load(1e9, 0.1), 2.0)
    assert book.choose("m", 2.0 + LONGEST_REST_S) == "a:1", "whatever it says"


def test_a_peer_that_fails_rests_longer_each_time(book: PeerBook) -> None:
    book.set(("a:1",))
    book.failed("a:1", 0.0)
    book.failed("a:1", 0.0)  # a request that was with it too
    assert (book.choose("m", FAILED_S - 0.01), book.choose("m", FAILED_S)) == (None, "a:1")
    book.failed("a:1", FAILED_S)
    assert book.choose("m", 2.9 * FAILED_S) is None
    assert book.choose("m", 3 * FAILED_S) == "a:1"
    book.answered("a:1", "m", None, 3 * FAILED_S)
    book.failed("a:1", 10.0)
    assert book.choose("m", 10.0 + FAILED_S) == "a:1", "it had answered"


def test_a_peer_without_an_artifact_is_asked_for_others(book: PeerBook) -> None:
    book.set(("a:1",))
    book.absent("a:1", "m", 0.0)
    assert book.choose("m", ABSENT_S - 0.1) is None
    assert book.choose("other", 0.0) == "a:1"
    assert book.choose("m", ABSENT_S) == "a:1"


def test_so_many_requests_are_with_one_peer_and_no_more(book: PeerBook) -> None:
    book.set(("a:1",))
    for _ in range(AT_ONCE):
        book.asked("a:1")
    assert book.choose("m", 0.0) is None
    book.set(("a:1", "b:1"))
    assert book.choose("m", 0.0) == "b:1", "what is known of a peer that stays is kept"
    book.set(("b:1",))
    for event in (book.asked, book.over):  # of one that has gone meanwhile
        event("a:1")
    book.failed("a:1", 0.0)
    assert len(book) == 1


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e99", "9" * 400])
def test_what_a_peer_says_of_itself_is_hostile(text: str) -> None:
    assert headers.load_of({"shoal-queue-ms": text, "shoal-infer-ms": "1"}) is None
    with pytest.raises(ValueError, match="milliseconds"):
        headers.timeout_s_of({"shoal-timeout-ms": text})
    with pytest.raises(ValueError, match="digest"):
        headers.artifact_of({"shoal-artifact": text})


def test_headers_say_what_they_were_told() -> None:
    said = {name.lower(): value for name, value in headers.load_headers(Load(0.25, 0.002)).items()}
    assert headers.load_of(said) == Load(0.25, 0.002)
    assert headers.timeout_s_of({}) == 0.0
    assert headers.timeout_s_of({"shoal-timeout-ms": "1500"}) == 1.5
    assert headers.timeout_s_of({"shoal-timeout-ms": "0"}) > 0, "0 would be for ever"
    assert headers.artifact_of({"shoal-artifact": "a" * 64}) == "a" * 64


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"forward": 1}, "balancing.forward"),
        ({"listen": "here"}, "balancing.listen"),
        ({"at": ["10.0.0.7"]}, "balancing.at"),
        ({"address": "8.8.8.8:1"}, "balancing.address"),
        ({"devices": ["a b"]}, "balancing.devices"),
        ({"tries": 0}, "balancing.tries"),
        ({"serve": True, "listen": "0.0.0.0:8473", "lan": "hall"}, "balancing.address"),
        ({"peers": []}, "balancing.peers"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(table: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}"):
        read_balancing(table)


def test_peers_are_told_an_address_that_they_can_reach() -> None:
    assert read_balancing({"serve": True, "listen": "192.168.1.7:8473"}).reached_at == "192.168.1.7:8473"
    assert read_balancing({"serve": True, "listen": "0.0.0.0:8473"}).reached_at == ""
    assert read_balancing({"forward": True, "listen": "192.168.1.7:8473"}).reached_at == "", "it answers nobody"
    assert not read_balancing({}).on


def balancing(config: Config, told: list[TellPeers], own: str | None = None) -> Balancing:
    def tell(message: TellPeers) -> bool:
        told.append(message)
        return True

    return Balancing(config, Credentials(config), lambda: own, tell)


def test_the_worker_is_told_of_peers_as_they_come_and_go(tmp_path: Path) -> None:
    config = enrolled(tmp_path, FleetCa.open(tmp_path / "ca", "f"), "one")
    wanted = BalancingConfig(forward=True, serve=True, listen="10.0.0.1:8473", at=("10.0.0.2:8473", "10.0.0.1:8473"))
    config = Config(config.device_id, config.state_dir, balancing=wanted)
    told: list[TellPeers] = []
    found = balancing(config, told, "10.0.0.1:8473")
    found.found("mdns", "10.0.0.3:8473")
    assert not told, "there is no worker yet"
    found.worker_ready()
    assert told[-1].peers == ("10.0.0.2:8473", "10.0.0.3:8473"), "all but itself"
    assert told[-1].trust is not None
    assert told[-1].trust.fleet == "f"
    assert Path(told[-1].trust.chain).exists()
    found.listed(["10.0.0.4:8473", "10.0.0.3:8473", "93.184.216.34:8473", "name:1"])
    assert told[-1].peers == ("10.0.0.2:8473", "10.0.0.4:8473", "10.0.0.3:8473"), "on the LAN, and once each"
    said = len(told)
    found.tick(1e9)
    found.found("mdns", "10.0.0.3:8473")
    assert len(told) == said, "nothing has changed"
    found.found("mdns", None)
    found.listed([])
    assert told[-1].peers == ("10.0.0.2:8473",)
    found.worker_ended()
    found.found("mdns", "10.0.0.5:8473")
    found.worker_ready()
    assert told[-1].peers == ("10.0.0.2:8473", "10.0.0.5:8473"), "the next worker knows nothing"


def test_the_worker_is_told_when_the_certificate_was_renewed(tmp_path: Path) -> None:
    ca, told = FleetCa.open(tmp_path / "ca", "f"), list[TellPeers]()
    device = enrolled(tmp_path, ca, "one")
    found = balancing(Config("one", device.state_dir, balancing=BalancingConfig(serve=True)), told)
    found.worker_ready()
    enrolled(tmp_path, ca, "one")
    found.tick(1e9)
    before, after = (one.trust for one in told)
    assert before is not None
    assert after is not None
    assert before.certificate != after.certificate
    assert (
        after.certificate == sha256(load_identity(identity_folder(device.state_dir)).certificate.encode()).hexdigest()
    )


def test_without_a_certificate_nobody_is_asked_beyond_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = BalancingConfig(forward=True, serve=True, listen="0.0.0.0:8473", at=("10.0.0.2:8473", "127.0.0.2:8473"))
    config, told = Config("d", tmp_path, balancing=wanted), list[TellPeers]()
    assert not takes_peers(config)
    balancing(config, told).worker_ready()
    assert "enrol it" in caplog.text
    assert (told[-1].peers, told[-1].trust) == (("127.0.0.2:8473",), None)
    plain = Config("d", tmp_path, balancing=wanted, sources=SourceConfig(insecure_plain_http=True))
    assert takes_peers(plain)
    balancing(plain, told).worker_ready()
    assert told[-1].peers == ("10.0.0.2:8473", "127.0.0.2:8473")
    near = Config("d", tmp_path, balancing=BalancingConfig(serve=True))
    assert takes_peers(near), "on this machine"


def test_nothing_is_told_where_it_is_off(tmp_path: Path) -> None:
    told: list[TellPeers] = []
    found = balancing(Config("d", tmp_path), told)
    found.worker_ready()
    found.listed(["10.0.0.4:8473"])
    assert not told
