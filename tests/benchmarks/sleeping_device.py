"""A device that speaks the agent's protocol, whose compute is a sleep a row: as fast on a busy machine as on none.

Usage: sleeping_device.py DEVICE BROKER_PORT ROW_MS. It says that it serves version 1 of `net`; its answer to a row is
the row's squares.
"""

from __future__ import annotations

import queue
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from agent.hardware import measure
from agent.protocol.codec import decode, encode
from agent.protocol.messages import Presence, Reported, ServingReport
from agent.protocol.parts import FEATURE, InferPart, PartAnswer
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server.domain.tensors import Tensor, binary_body, read_request

SERVING = ServingReport("net", "1", "0" * 64, "sleeps", "onnxruntime 1", "cpu", 0.0)


def main() -> None:
    device, port, row_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000
    parts: queue.SimpleQueue[tuple[float, InferPart]] = queue.SimpleQueue()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"shoal-{device}")
    presence = device_topic(device, DeviceTopic.PRESENCE)
    client.will_set(presence, encode(Presence(online=False, boot_id="b")), qos=1, retain=True)
    client.on_message = lambda _c, _d, message: parts.put((time.monotonic(), decode(message.payload, InferPart)))
    facts = measure(Path(tempfile.gettempdir()), tags={})
    facts = msgspec.structs.replace(facts, features=(*facts.features, FEATURE))

    def connected(client: paho.Client, *_: Any) -> None:
        client.subscribe(device_topic(device, DeviceTopic.INFER), 1)
        client.publish(presence, encode(Presence(online=True, boot_id="b")), qos=1, retain=True)
        said = Reported(SPOKEN, "b", 1, 0, facts, serving=(SERVING,), sent_at=time.time())
        client.publish(device_topic(device, DeviceTopic.REPORTED), encode(said), qos=1)

    client.on_connect = connected
    client.on_socket_open = lambda _c, _d, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.connect("127.0.0.1", port, keepalive=15)
    client.loop_start()
    free_at = 0.0
    while True:
        came, part = parts.get()
        began = time.monotonic()
        asked = read_request(part.body, part.header_length)
        row = np.frombuffer(asked.inputs[0].data, np.float32).reshape(asked.inputs[0].shape)
        body, length = binary_body(
            {"model_name": part.model, "model_version": "1"},
            "outputs",
            [Tensor("y", "FP32", row.shape, memoryview((row * row).tobytes()))],
        )
        # By the clock, so that what a sleep takes too long is made up for: a device is as fast as it says.
        free_at = max(free_at, came) + asked.rows * row_s
        time.sleep(max(0.0, free_at - time.monotonic()))
        answer = PartAnswer(part.part_id, part.attempt, 200, length, body, infer_s=time.monotonic() - began)
        client.publish(device_topic(device, DeviceTopic.INFERRED), encode(answer), qos=1)


if __name__ == "__main__":
    main()
