"""A wave of devices that download one content from the real streamer, in simulated time over links that lose messages.

The devices' part is the agent's own: what they say and keep is `DownloadProgress` and `Part`, on real files.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

from agent.protocol.manifest import DataFile
from agent.protocol.messages import Need
from agent.update.download import FREELY, Allowance, DownloadProgress
from agent.update.store import Part
from fleet_server.gateway.streamer import Send, Streamer

CHUNK = 4
TICK_S = 0.02
LATENCY_S = 0.005


@dataclass
class Link:
    """How messages reach a device.

    Attributes:
        chunks_s: how many chunks a second it carries; what is more waits in the broker.
        loss: share of chunks that never come.
        twice: share that comes twice.
        late: share that comes up to 0.2 s later than it should.
        down: from when to when nothing comes through.
    """

    chunks_s: float = 2000.0
    loss: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    down: tuple[float, float] = (0.0, 0.0)

    def is_down(self, now: float) -> bool:
        return self.down[0] <= now < self.down[1]


@dataclass
class Device:
    name: str
    part: Part
    link: Link
    joins: float
    allowed: Allowance = FREELY
    leaves: float = float("inf")
    progress: DownloadProgress | None = None
    done_at: float | None = None
    free_at: float = 0.0
    received: int = 0
    most_waiting: int = 0
    was_down: bool = False


@dataclass
class Wave:
    """The simulation.

    Attributes:
        sends: what the server published.
        done: whether every device that stayed has everything.
    """

    folder: Path
    chunks: int
    seed: int = 0
    sends: list[tuple[float, Send]] = field(default_factory=list)
    devices: dict[str, Device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.content = self.random.randbytes(self.chunks * CHUNK - 1)
        self.file = DataFile(hashlib.sha256(self.content).hexdigest(), len(self.content), CHUNK)
        self.streamer = Streamer()
        self.now = 0.0
        self._order = itertools.count()
        self._flying: list[tuple[float, int, Device | None, object]] = []

    def add(
        self, name: str, link: Link | None = None, *, joins: float = 0.0, allowed: Allowance = FREELY, has: int = 0
    ) -> Device:
        """A device; it has the first `has` chunks already."""
        folder = self.folder / name
        folder.mkdir()
        part = Part(folder, self.file)
        for chunk in range(has):
            part.write(chunk, self.piece(chunk))
        device = self.devices[name] = Device(name, part, link or Link(), joins, allowed)
        return device

    def piece(self, chunk: int) -> bytes:
        return self.content[chunk * CHUNK : (chunk + 1) * CHUNK]

    @property
    def done(self) -> bool:
        return all(one.done_at is not None or one.leaves <= self.now for one in self.devices.values())

    def run(self, until: float) -> None:
        """Go on until every device is done, or the time is over."""
        while self.now < until and not self.done:
            self.now += TICK_S
            while self._flying and self._flying[0][0] <= self.now:
                _, _, device, message = heapq.heappop(self._flying)
                self._arrive(device, message)
            for device in self.devices.values():
                self._speak(device)
            for send in self.streamer.next(self.now, 64):
                self._publish(send)

    def check(self) -> None:
        """Everything that is done is right to the last byte."""
        for device in self.devices.values():
            if device.done_at is not None:
                assert device.part.finish(), device.name
            device.part.close()

    def close(self) -> None:
        for device in self.devices.values():
            device.part.close()

    def _speak(self, device: Device) -> None:
        if device.done_at is not None or not device.joins <= self.now < device.leaves:
            return
        if device.progress is None:
            device.progress = DownloadProgress(device.name, device.part, 1e9, self.now)
        if device.link.is_down(self.now):
            device.was_down = True
            return
        if device.was_down:
            device.was_down = False
            device.progress.link_up(self.now)
        need = device.progress.need(self.now, device.allowed)
        if need is not None:
            self._post(self.now + LATENCY_S, None, (device.name, need))

    def _publish(self, send: Send) -> None:
        self.sends.append((self.now, send))
        value = 0
        for chunk in send.chunks:
            value ^= int.from_bytes(self.piece(chunk), "little")
        size = max(len(self.piece(chunk)) for chunk in send.chunks)
        message = (send.chunks, value.to_bytes(size, "little"))
        for device in self.devices.values():
            listens = device.progress is not None and device.done_at is None and not device.allowed.alone
            if send.device_id == device.name or (send.device_id is None and listens):
                self._to(device, message)

    def _to(self, device: Device, message: object) -> None:
        link = device.link
        if link.is_down(self.now) or device.leaves <= self.now:
            return
        device.free_at = max(self.now, device.free_at) + 1 / link.chunks_s
        device.most_waiting = max(device.most_waiting, int((device.free_at - self.now) * link.chunks_s))
        if self.random.random() < link.loss:
            return
        for _ in range(1 + (self.random.random() < link.twice)):
            late = self.random.uniform(0, 0.2) if self.random.random() < link.late else 0.0
            self._post(device.free_at + LATENCY_S + late, device, message)

    def _post(self, at: float, device: Device | None, message: object) -> None:
        heapq.heappush(self._flying, (at, next(self._order), device, message))

    def _arrive(self, device: Device | None, message: object) -> None:
        if device is None:
            name, need = message  # type: ignore[misc]
            assert isinstance(need, Need)
            self.streamer.hear(name, need, self.now)
            return
        if device.done_at is not None or device.progress is None or device.leaves <= self.now:
            return
        device.received += 1
        chunks, payload = message  # type: ignore[misc]
        if device.progress.take(chunks, payload, self.now):
            device.done_at = self.now
            self._post(self.now + LATENCY_S, None, (device.name, Need(self.file.digest, device.name, ())))
