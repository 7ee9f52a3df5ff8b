"""Both links on brokers with several addresses: real Mosquittos, of which one after the other is killed."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.config import Config
from agent.mqtt import LinkUp, MqttMessage
from agent.mqtt import MqttLink as AgentLink
from agent.protocol.topics import DeviceTopic, device_topic, every_shard_filter, shard_filter
from fleet_server.gateway.broker import find_mosquitto
from fleet_server.gateway.inbox import Message
from fleet_server.gateway.mqtt import MqttLink as ServerLink
from tests.fleet import free_port, wait_until


@contextmanager
def broker(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    config = folder / f"{port}.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    executable, more = find_mosquitto("mosquitto")
    with subprocess.Popen([executable, "-c", str(config)], env={**os.environ, **more}, stderr=subprocess.DEVNULL) as it:
        try:
            yield it
        finally:
            it.kill()


def test_both_go_on_at_the_next_address(tmp_path: Path) -> None:
    dead, first, second = (free_port() for _ in range(3))
    url = ",".join(f"mqtt://127.0.0.1:{port}" for port in (dead, first, second))
    events: queue.Queue[LinkUp | MqttMessage] = queue.Queue()
    heard: queue.Queue[Message] = queue.Queue()
    reported = device_topic("dev", DeviceTopic.REPORTED)
    device = AgentLink(Config("dev", tmp_path, broker=url), "boot", events.put)
    server = ServerLink(url, "server", [every_shard_filter(DeviceTopic.REPORTED)], heard.put)
    with ExitStack() as stack:
        a = stack.enter_context(broker(tmp_path, first))
        stack.enter_context(broker(tmp_path, second))
        for one in (device, server):
            stack.callback(one.stop)
            one.start()
        for last in (False, True):
            wait_until("both", lambda: device.connected and server.connected and server.settled, 20)
            assert device.publish(DeviceTopic.REPORTED, b"{}") is not None
            assert heard.get(timeout=5) == Message(reported, b"{}")
            if not last:
                a.kill()
                wait_until("the loss", lambda: not (device.connected or server.connected), 5)
    assert events.get_nowait() == events.get_nowait() == LinkUp(0)


def test_what_a_server_hears_changes_and_is_said_again(tmp_path: Path) -> None:
    port = free_port()
    heard: queue.Queue[Message] = queue.Queue()
    possible = [shard_filter(shard, DeviceTopic.REPORTED) for shard in range(3)]
    with broker(tmp_path, port), ExitStack() as stack:
        url = f"mqtt://127.0.0.1:{port}"

        def link(name: str, filters: list[str]) -> ServerLink:
            made = ServerLink(url, name, filters, heard.put, possible=possible)
            made.start()
            wait_until("the link", lambda: made.settled, 10)
            return made

        server, sender = link("server", possible[:2]), link("sender", [])
        stack.callback(sender.stop)

        def said(*shards: int) -> list[str]:
            for shard in shards:
                assert sender.publish(f"shoal/v1/{shard}/d/x/reported", b"")
            found = []
            while True:
                try:
                    found.append(heard.get(timeout=0.3).topic.split("/")[2])
                except queue.Empty:
                    return found

        assert said(0, 1, 2) == ["0", "1"]
        server.want(possible[1:])
        wait_until("the others", lambda: server.settled, 5)
        assert said(0, 1, 2) == ["1", "2"]
        # What the broker keeps is had anew, and no more than that.
        presence = "shoal/v1/0/d/x/presence"
        kept = threading.Event()
        assert sender.publish(presence, b"kept", retain=True, acknowledged=kept.set)
        assert kept.wait(5)
        server.hear_again([shard_filter(0, DeviceTopic.PRESENCE)])
        assert heard.get(timeout=5) == Message(presence, b"kept", retained=True)
        assert sender.publish(presence, b"later")
        assert said() == []
        # A session that outlived its server keeps no filter that is not wanted any more.
        server.stop()
        again = link("server", possible[:1])
        stack.callback(again.stop)
        assert said(0, 1, 2) == ["0"]
