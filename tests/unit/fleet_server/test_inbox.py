"""A device that floods crowds out nobody: shares, turns and bounds of the gateway's inbox."""

from __future__ import annotations

from agent.protocol.topics import DeviceTopic, device_topic
from fleet_server.gateway.handlers import is_report, is_telemetry
from fleet_server.gateway.inbox import FairInbox, Message, Share, sender_of
from fleet_server.rates import KeyedBuckets, TokenBucket


def message(device: str, payload: bytes = b"x") -> Message:
    return Message(device_topic(device, DeviceTopic.REPORTED), payload)


def emptied(inbox: FairInbox) -> list[str]:
    found = []
    while (one := inbox.get(0)) is not None:
        found.append(sender_of(one.topic))
    return found


def test_devices_are_served_in_turns() -> None:
    inbox = FairInbox(lambda _: None)
    for device in ("a", "a", "a", "a", "b", "c"):
        inbox.put(message(device))
    assert emptied(inbox) == ["a", "b", "c", "a", "a", "a"]


def test_of_what_says_all_only_the_newest_waits() -> None:
    """A server that is behind takes in a device's last report, and none that it would overwrite at once."""
    inbox = FairInbox(lambda _: None, whole=is_report, limit_bytes=100)
    presence = Message(device_topic("a", DeviceTopic.PRESENCE), b"here")
    for number in range(30):
        inbox.put(message("a", b"report %2d" % number))
        inbox.put(message("b", b"report %2d" % number))
    inbox.put(presence)
    inbox.put(message("a", b"report 30"))
    inbox.put(presence)
    found = [inbox.get(0) for _ in range(4)]
    assert found == [message("a", b"report 30"), message("b", b"report 29"), presence, presence]
    assert inbox.get(0) is None
    inbox.put(message("a", b"x" * 100))
    assert inbox.get(0) == message("a", b"x" * 100), "what was dropped takes no room"


def test_a_report_is_not_put_off_by_the_next_one() -> None:
    """Or a device that reports more often than its turn comes would never be heard."""
    inbox = FairInbox(lambda _: None, whole=is_report, kept=is_telemetry)
    for number in range(9):
        inbox.put(message("a", b"report %d" % number))
        inbox.put(Message(device_topic("a", DeviceTopic.TELEMETRY), b"batch %d" % number))
    assert inbox.get(0) == message("a", b"report 8")


def test_what_is_alike_is_taken_together_and_the_rest_keeps_its_turn() -> None:
    inbox = FairInbox(lambda _: None)
    batch = {name: Message(device_topic(name, DeviceTopic.TELEMETRY), b"batch") for name in "abcd"}
    inbox.put(message("a", b"report"))
    for name in "abcd":
        inbox.put(batch[name])
        inbox.put(Message(batch[name].topic, b"next"))
    inbox.put(message("b", b"report"))
    taken = inbox.get_more(is_telemetry, limit=5, limit_bytes=1000)
    assert taken == [batch["b"], batch["c"], batch["d"], *(Message(batch[name].topic, b"next") for name in "bc")]
    assert inbox.get(0) == message("a", b"report")
    assert inbox.get_more(is_telemetry, limit=5, limit_bytes=9) == [Message(batch["d"].topic, b"next"), batch["a"]]
    assert [inbox.get(0) for _ in range(2)] == [message("b", b"report"), Message(batch["a"].topic, b"next")]
    assert inbox.get(0) is None


def test_what_is_beyond_a_share_is_dropped_and_noted() -> None:
    dropped: list[str] = []
    inbox = FairInbox(dropped.append, Share(messages=10, messages_s=1, waiting=5))
    for _ in range(100):
        inbox.put(message("flood"))
    inbox.put(message("honest"))
    inbox.put(Message("not/a/device", b""))
    assert dropped == ["flood"] * 95
    assert emptied(inbox).count("flood") == 5
    dropped.clear()
    inbox.put(message("big", b"x" * 33_000_000))
    assert dropped == ["big"]


def test_all_devices_together_are_bounded_and_none_is_blamed() -> None:
    flooded: list[str] = []
    inbox = FairInbox(flooded.append, limit=50, limit_bytes=1000)
    for number in range(60):
        inbox.put(message(f"d{number}"))
    assert inbox.overflowed == 10
    assert len(emptied(inbox)) == 50
    inbox.put(message("a", b"x" * 1001))
    assert inbox.overflowed == 11
    assert flooded == []


def test_telemetry_leaves_room_for_reports_and_waits_once() -> None:
    """A server that is behind must still hear what its devices run; their telemetry they keep."""
    inbox = FairInbox(lambda _: None, whole=is_report, kept=is_telemetry, limit=20)
    for number in range(30):
        for _ in range(3):
            inbox.put(Message(device_topic(f"d{number}", DeviceTopic.TELEMETRY), b"batch 1"))
    assert inbox.overflowed == 3 * 20
    for number in range(30):
        inbox.put(message(f"d{number}", b"report"))
    assert inbox.overflowed == 3 * 20 + 20
    inbox.put(message("d0", b"newer"))  # in the place of the one that waits
    assert inbox.overflowed == 3 * 20 + 20
    found = [one for _ in range(20) if (one := inbox.get(0)) is not None]
    assert sum(is_telemetry(one) for one in found) == 10
    assert message("d0", b"newer") in found


def test_a_bucket_gains_what_time_gives_and_no_more() -> None:
    bucket = TokenBucket(rate=2, burst=4, now=0)
    assert bucket.wait_s(4, 0) == 0
    assert [bucket.take(1, 0) for _ in range(5)] == [True] * 4 + [False]
    assert bucket.wait_s(1, 0.25) == 0.25
    assert bucket.take(2, 1)
    assert not bucket.take(1, 1)
    assert not bucket.take(5, 1000)
    assert bucket.take(4, 1000)
    bucket.give(100)
    assert bucket.take(4, 1000)
    assert not bucket.take(1, 999)


def test_buckets_of_many_keys_are_bounded() -> None:
    buckets = KeyedBuckets(1, 1, keys=2)
    assert buckets.of("a", 0).take(1, 0)
    assert not buckets.of("a", 0).take(1, 0)
    for key in ("b", "c"):
        buckets.of(key, 0)
    assert buckets.of("a", 0).take(1, 0)
