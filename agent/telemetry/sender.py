"""What was measured on its way to the server: windows into the spool, and batches of it over the link until stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agent.condition import Condition
from agent.mqtt import MqttLink
from agent.protocol.messages import TelemetryAck, TelemetryBatch
from agent.protocol.topics import DeviceTopic
from agent.protocol.version import SPOKEN
from agent.serving.ipc import Window
from agent.telemetry.batch import fitting
from agent.telemetry.host import HostMeter
from agent.telemetry.spool import Spool
from agent.update.journal import Journal

INTERVAL = "telemetry_interval_s"  # in the journal
FIRST_S = 10.0  # where the server has not said yet


class TelemetrySender:
    """Collects, keeps and sends.

    Args:
        state_dir: of the agent.
        journal: keeps how often the server wants windows.
        spool: keeps batches until the server has them.
        link: to the server.
        condition: hears of a spool that can't be written.
        collect: has the worker close its window; it comes back to `window`.
    """

    def __init__(
        self,
        state_dir: Path,
        journal: Journal,
        spool: Spool,
        link: MqttLink,
        condition: Condition,
        collect: Callable[[], None],
    ) -> None:
        self._state_dir = state_dir
        self._journal, self._spool, self._link, self._condition = journal, spool, link, condition
        self._collect = collect
        self._meter = HostMeter()
        self._interval_s = journal.number(INTERVAL, FIRST_S)
        self._collect_at = time.monotonic() + self._interval_s

    def due_in(self, now: float) -> float:
        """How long nothing need be collected, in seconds."""
        return self._collect_at - now

    def tick(self, now: float) -> None:
        """Collect when it is time."""
        if now >= self._collect_at:
            self._collect_at = now + self._interval_s
            self._collect()

    def wanted(self, interval_s: float) -> None:
        """The server wants a window so often.

        Raises:
            OSError: when that can't be written; it holds all the same until the agent ends.
        """
        self._collect_at = min(self._collect_at, time.monotonic() + interval_s)
        if self._interval_s != interval_s:
            self._interval_s = interval_s
            self._journal.keep_number(INTERVAL, interval_s)

    def window(self, message: Window, started: float) -> None:
        """The worker's window, which began at that time (Unix seconds), is over."""
        ended = time.time()
        host = self._meter.measure(self._state_dir, message.rss_mb)
        models = fitting(message.models)
        self._condition.guard(
            lambda: self._spool.add(
                lambda spool_id, sequence: TelemetryBatch(SPOKEN, spool_id, sequence, started, ended, models, host)
            )
        )
        self._condition.count_dropped()
        self._send()

    def acknowledged(self, ack: TelemetryAck) -> None:
        """The server has stored some; what gathered while it was away goes as fast as it is stored."""
        self._spool.acknowledge(ack)
        self._send()

    def link_up(self) -> None:
        """The connection is a new one."""
        self._spool.pace.link_up()

    def _send(self) -> None:
        if self._link.connected:
            for _, payload in self._spool.due(time.monotonic()):
                self._link.publish(DeviceTopic.TELEMETRY, payload)
