"""Which source is used when: the order, pauses after failures, and what becomes of a whole that is wrong."""

from __future__ import annotations

from agent.source_config import DEFAULT_ORDER, SourceKind
from agent.update.sources import (
    ABSENT_S,
    LIED_S,
    LONGEST_PAUSE_S,
    MQTT_SILENT_S,
    PAUSE_S,
    REMEMBERED,
    Place,
    SourceBook,
)

D = "a" * 64
USB = Place("usb stick", SourceKind.USB)
PEER = Place("peer 10.0.0.7:1", SourceKind.PEER)
OTHER = Place("peer 10.0.0.8:1", SourceKind.PEER)
HTTPS = Place("https", SourceKind.HTTPS)
EVERY = [HTTPS, PEER, OTHER, USB]


def choose(book: SourceBook, places: list[Place], now: float = 0.0, silent: float | None = 0.0) -> Place | None:
    return book.choose(D, places, now, mqtt_silent_s=silent)


def test_the_order_decides_and_mqtt_is_in_it() -> None:
    book = SourceBook(DEFAULT_ORDER)
    assert choose(book, EVERY) is USB
    assert choose(book, [HTTPS, PEER]) is PEER
    assert choose(book, [HTTPS]) is None, "MQTT comes before HTTPS"
    assert choose(book, [HTTPS], silent=MQTT_SILENT_S) is HTTPS
    assert choose(book, [HTTPS], silent=None) is HTTPS
    assert choose(book, [], silent=None) is None
    assert choose(SourceBook([SourceKind.HTTPS, SourceKind.MQTT]), EVERY) is HTTPS, "what is not named is not used"


def test_one_that_fails_rests_ever_longer_and_others_get_their_turn() -> None:
    book = SourceBook(DEFAULT_ORDER)
    now, pauses = 0.0, []
    for _ in range(10):
        book.failed(PEER.name, now)
        assert choose(book, [PEER, OTHER], now) is OTHER
        began = now
        while choose(book, [PEER], now) is None:
            now += 1.0
        pauses.append(now - began)
    assert pauses[:3] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    book.brought(D, PEER.name)
    book.failed(PEER.name, now)
    assert choose(book, [PEER], now + PAUSE_S) is PEER, "one that brought something begins anew"


def test_one_that_does_not_have_it_is_asked_again_for_it_later_and_for_others_at_once() -> None:
    book = SourceBook(DEFAULT_ORDER)
    book.absent(D, PEER.name, 0.0)
    assert choose(book, [PEER], ABSENT_S - 1) is None
    assert choose(book, [PEER], ABSENT_S) is PEER
    assert book.choose("b" * 64, [PEER], 1.0, mqtt_silent_s=0.0) is PEER


def test_a_whole_that_is_wrong_is_the_servers_alone_from_then_on() -> None:
    book = SourceBook(DEFAULT_ORDER)
    book.brought(D, USB.name)
    book.brought(D, PEER.name)
    assert book.mismatched(D, 0.0) == [PEER.name, USB.name]
    assert choose(book, EVERY, 1.0, silent=None) is None
    assert book.choose("b" * 64, EVERY, 1.0, mqtt_silent_s=None) is OTHER, "who brought a part rests for everything"
    assert choose(book, EVERY, LIED_S) is USB
    assert book.mismatched(D, LIED_S) == [], "nobody is blamed twice for the same bytes"
    assert choose(book, EVERY, LIED_S) is USB, "MQTT alone was wrong: nobody is barred for it"


def test_what_is_remembered_is_bounded() -> None:
    book = SourceBook(DEFAULT_ORDER)
    for number in range(REMEMBERED * 2):
        book.failed(f"peer {number}", 0.0)
        book.absent(str(number), "peer", 0.0)
        book.brought(str(number), "peer")
        book.bar(str(number), 0.0)
    kept = (book._rests, book._absent, book._brought, book._barred)
    assert all(len(one) <= REMEMBERED for one in kept)
