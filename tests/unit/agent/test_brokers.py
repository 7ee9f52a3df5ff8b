"""Where a broker is reached, and which of its addresses is next."""

from __future__ import annotations

import pytest

from agent.protocol.brokers import BrokerAddresses, BrokerChoice, read_brokers, without_credentials

THREE = "mqtt://a:1,mqtt://b:2, mqtt://c"


def test_one_address_or_several() -> None:
    assert read_brokers("mqtt://u:p%20w@host") == BrokerAddresses(False, (("host", 1883),), "u", "p w")
    assert read_brokers("mqtts://[::1]") == BrokerAddresses(True, (("::1", 8883),))
    assert read_brokers(THREE).places == (("a", 1), ("b", 2), ("c", 1883))
    assert read_brokers("mqtt://a,mqtt://a").places == (("a", 1883),)
    assert without_credentials("mqtts://u:p@a,mqtts://u:p@[::1]:5") == "mqtts://a:8883,mqtts://[::1]:5"


@pytest.mark.parametrize("text", ["", "http://a", "mqtt://", "mqtt://a:x", "mqtt://a:0", "mqtt://a,", "a:1883"])
def test_what_is_no_address_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="it is not mqtt://host:port"):
        read_brokers(text)


@pytest.mark.parametrize("text", ["mqtt://a,mqtts://b", "mqtt://u:p@a,mqtt://b", "mqtt://u:p@a,mqtt://u:q@b"])
def test_addresses_of_one_cluster_go_together(text: str) -> None:
    with pytest.raises(ValueError, match="the same scheme, user and password") as refused:
        read_brokers(text)
    assert "u:" not in str(refused.value)


def test_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16"):
        read_brokers(",".join(f"mqtt://h{number}" for number in range(17)))


def test_after_a_failure_comes_the_next_and_after_a_loss_the_first() -> None:
    choice = BrokerChoice(read_brokers(THREE), longest_s=4)
    assert (choice.place, choice.pause_s) == (("a", 1), 1)
    assert choice.ended()
    assert (choice.place, choice.pause_s) == (("b", 2), 1)
    choice.accepted()
    assert choice.ended()
    assert choice.place == ("a", 1)
    pauses = []
    for _ in range(12):
        choice.ended()
        pauses.append(choice.pause_s)
    assert pauses == [1, 1, 2, 1, 1, 4, 1, 1, 4, 1, 1, 4]


def test_devices_may_begin_with_different_ones() -> None:
    brokers = read_brokers(THREE)
    assert [BrokerChoice(brokers, start=number).place[0] for number in range(5)] == ["a", "b", "c", "a", "b"]


def test_one_address_is_never_left() -> None:
    choice = BrokerChoice(read_brokers("mqtt://a"))
    assert not choice.ended()
    choice.accepted()
    assert not choice.ended()
    assert choice.place == ("a", 1883)
