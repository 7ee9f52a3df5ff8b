"""`python -m tests.faults.telemetry_sender`: devices with the agent's own spool and MQTT link.

They make samples. Whatever is not acknowledged soon is sent again, and some acknowledgements are thrown away as if they
had been lost. What was made and what is still kept is written to a file; it ends when all was made and acknowledged.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import time
from pathlib import Path

from agent.config import Config
from agent.mqtt import LinkUp, MqttLink, MqttMessage
from agent.protocol.codec import decode, encode
from agent.protocol.facts import DeviceFacts
from agent.protocol.messages import HostWindow, ModelWindow, Reported, TelemetryAck, TelemetryBatch
from agent.protocol.topics import DeviceTopic
from agent.protocol.version import SPOKEN
from agent.telemetry.pace import SendPace
from agent.telemetry.spool import Spool

FACTS = DeviceFacts(
    agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
    disk_free_mb=1,
)  # fmt: skip
TURN_S = 0.05
PER_TURN = 5  # what the server lets a device send for long
UNDERWAY = 20
RESEND_S = 2.0
DEAF = 0.1  # share of acknowledgements that are lost


def requests_of(sample: int) -> int:
    """What a sample says, so that one that is lost is not made good by another that came twice."""
    return 1 + sample % 97


class Device:
    def __init__(self, folder: Path, name: str, broker: str, samples: int) -> None:
        state = folder / name
        state.mkdir(parents=True, exist_ok=True)
        self._name, self._samples = name, samples
        self._spool = Spool(state / "spool.db", SendPace(first_s=RESEND_S, most=UNDERWAY))
        self._events: queue.SimpleQueue[MqttMessage | LinkUp] = queue.SimpleQueue()
        self._link = MqttLink(Config(name, state, broker), name, self._events.put)
        self._chance = random.Random(name)
        self._said = 0
        self._open: set[tuple[str, int]] = set()
        self.made = 0
        self._link.start()

    @property
    def kept(self) -> int:
        return len(self._open)

    def turn(self) -> None:
        while not self._events.empty():
            self._hear(self._events.get())
        for _ in range(min(PER_TURN, self._samples - self.made)):
            self.made += 1
            self._spool.add(self._batch)
        if self._link.connected:
            for _, payload in self._spool.due(time.monotonic()):
                self._link.publish(DeviceTopic.TELEMETRY, payload)

    def stop(self) -> None:
        self._link.stop()
        self._spool.close()

    def _batch(self, spool_id: str, sequence: int) -> TelemetryBatch:
        self._open.add((spool_id, sequence))
        count = requests_of(self.made)
        window = ModelWindow("m", "1", "a" * 64, f"d-{self._name}", "cpu", count, 0, 0, count, {sequence % 300: count})
        now = time.time()
        return TelemetryBatch(SPOKEN, spool_id, sequence, now - 1, now, (window,), HostWindow(cpu_percent=1.0))

    def _hear(self, event: MqttMessage | LinkUp) -> None:
        if isinstance(event, LinkUp):
            self._said += 1
            hello = Reported(protocol=SPOKEN, boot_id=self._name, sequence=self._said, revision=0, facts=FACTS)
            self._link.publish(DeviceTopic.REPORTED, encode(hello))
        elif event.topic.endswith(f"/{DeviceTopic.TELEMETRY_ACK}") and self._chance.random() > DEAF:
            ack = decode(event.payload, TelemetryAck)
            self._spool.acknowledge(ack)
            self._open -= {(ack.spool_id, one) for one in ack.sequences}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("broker")
    parser.add_argument("prefix")
    parser.add_argument("devices", type=int)
    parser.add_argument("samples", type=int)
    given = parser.parse_args()
    devices = [
        Device(given.folder, f"{given.prefix}{number}", given.broker, given.samples) for number in range(given.devices)
    ]
    progress = given.folder / f"{given.prefix}.json"
    while True:
        for one in devices:
            one.turn()
        made, kept = sum(one.made for one in devices), sum(one.kept for one in devices)
        progress.with_suffix(".new").write_text(json.dumps({"made": made, "kept": kept}))
        progress.with_suffix(".new").replace(progress)
        if made == given.devices * given.samples and not kept:
            break
        time.sleep(TURN_S)
    for one in devices:
        one.stop()


if __name__ == "__main__":
    main()
