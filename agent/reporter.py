"""What the device says of itself: its facts, measured when there is time for it, and when a report is due."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from agent.commands.measuring import changed
from agent.config import Config
from agent.hardware import measure
from agent.link import detect_link
from agent.mqtt import MqttLink
from agent.protocol.codec import encode
from agent.protocol.facts import AgentFacts, DeviceFacts, LinkFacts
from agent.protocol.messages import Reported
from agent.protocol.parts import FEATURE
from agent.protocol.topics import DeviceTopic

FACTS_WITHIN_S = 5.0  # of the start, whatever the worker does
REPORT_EVERY_S = 300.0
LINK_EVERY_S = 5.0


class Reporter:
    """Reports what is true when something changed, and now and then.

    Args:
        config: of the agent.
        link: to the server.
        set_link: takes the kind of link that the server is reached by.
        about_agent: what the agent says of its own releases.
        settled: whether what served before serves again: measuring takes processors and time from it.
        compose: all that is true, as report number so and so, with these facts.
    """

    def __init__(
        self,
        config: Config,
        link: MqttLink,
        *,
        set_link: Callable[[LinkFacts], None],
        about_agent: Callable[[], AgentFacts],
        settled: Callable[[], bool],
        compose: Callable[[int, DeviceFacts], Reported],
    ) -> None:
        self._config, self._link = config, link
        self._set_link, self._about_agent, self._settled, self._compose = set_link, about_agent, settled, compose
        self._facts: DeviceFacts | None = None
        self._facts_at = time.monotonic() + FACTS_WITHIN_S
        self._link_facts = LinkFacts()
        self._link_at = 0.0
        self._sequence = 0
        self._reported_at = 0.0  # nothing: something is to be reported

    def changed(self) -> None:
        """Something is to be reported soon."""
        self._reported_at = 0.0

    def measure(self) -> DeviceFacts:
        """The facts, measured now; called from threads too."""
        config = self._config
        facts = measure(config.state_dir, tags=config.tags, runtimes=config.runtimes)
        return msgspec.structs.replace(
            facts,
            commands=config.commands.allowed,
            features=(*facts.features, FEATURE) if config.inference.remote else facts.features,
            inference_address=config.inference.address,
            agent=self._about_agent(),
            balancing_address=config.balancing.reached_at,
            balancing_lan=config.balancing.lan,
        )

    def take(self, facts: DeviceFacts) -> tuple[str, ...]:
        """Report facts that were measured again; the names of those that differ from before."""
        before, self._facts = self._facts or facts, facts
        self.report(force=True)
        return changed(before, facts)

    def tick_facts(self) -> None:
        """Measure the machine once."""
        if self._facts is None and (self._settled() or time.monotonic() >= self._facts_at):
            self._facts = self.measure()
            self.changed()

    def tick_link(self, now: float) -> None:
        """Find out, now and then, by what kind of link the server is reached; a change is reported."""
        if now < self._link_at:
            return
        self._link_at = now + LINK_EVERY_S
        found = detect_link(self._config.link_type, self._config.link_metered)
        if found != self._link_facts:
            self._link_facts = found
            self._set_link(found)
            self.changed()

    def report(self, *, force: bool) -> None:
        """Say what is true, when something changed, when the last time was long ago, or when somebody has to know."""
        now = time.monotonic()
        due = force or self._reported_at == 0.0 or now - self._reported_at > REPORT_EVERY_S
        if not due or not self._link.connected:
            return
        if self._facts is None:
            self._reported_at = 0.0  # as soon as they are known
            return
        self._reported_at = now
        self._sequence += 1
        facts = msgspec.structs.replace(self._facts, link=self._link_facts)
        self._link.publish(DeviceTopic.REPORTED, encode(self._compose(self._sequence, facts)))
