"""Which version of MQTT is spoken, decided without a broker."""

from __future__ import annotations

from paho.mqtt.enums import MQTTProtocolVersion

from agent.protocol.mqtt_version import PAUSE_MAX_S, MqttVersion, MqttVersionChoice
from agent.protocol.topics import client_id


def test_the_levels_are_those_that_the_library_sends() -> None:
    assert MQTTProtocolVersion(MqttVersion.V3_1_1) is MQTTProtocolVersion.MQTTv311
    assert MQTTProtocolVersion(MqttVersion.V5) is MQTTProtocolVersion.MQTTv5
    assert [one.label for one in MqttVersion] == ["3.1.1", "5"]


def test_a_broker_that_refuses_five_is_spoken_to_by_the_older_for_good() -> None:
    choice = MqttVersionChoice()
    assert choice.version is MqttVersion.V5
    assert choice.refused()
    assert choice.version is MqttVersion.V3_1_1
    assert not any(choice.closed() for _ in range(10)), "what it said holds, whatever ends the connection"
    assert choice.answered()
    assert not choice.answered(), "that is no news"
    assert not choice.refused(), "there is none older"
    assert choice.version is MqttVersion.V3_1_1


def test_a_broker_that_only_closes_gets_both_in_turns_and_ever_longer_pauses() -> None:
    choice = MqttVersionChoice()
    tried = []
    for _ in range(16):
        tried.append(choice.version)
        choice.closed()
    five, older = [MqttVersion.V5] * 2, [MqttVersion.V3_1_1] * 2
    assert tried == (five + older) * 4
    assert choice.pause_s == PAUSE_MAX_S


def test_a_connection_that_was_accepted_once_may_end_as_often_as_it_likes() -> None:
    for switches in (0, 1):
        choice = MqttVersionChoice()
        for _ in range(2 * switches):
            choice.closed()
        version = choice.version
        assert choice.answered()
        assert choice.pause_s == 1
        assert not any(choice.closed() for _ in range(10))
        assert choice.version is version


def test_a_broker_that_was_replaced_by_an_older_one_is_noticed() -> None:
    choice = MqttVersionChoice()
    choice.answered()
    assert choice.refused()
    assert choice.answered(), "that is news"


def test_where_sessions_are_dear_nothing_is_left_in_them() -> None:
    assert (MqttVersion.V5.qos, MqttVersion.V3_1_1.qos) == (1, 0)


def test_client_ids_have_no_dot_and_are_one_a_device() -> None:
    ids = ["cam.1", "cam-1", "cam_1", "cam1", "c.am.1"]
    found = [client_id(one) for one in ids]
    assert len(set(found)) == len(ids)
    assert not any("." in one for one in found)
    assert found[1:4] == ids[1:4]
