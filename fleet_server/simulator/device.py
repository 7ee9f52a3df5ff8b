"""One simulated device, as the server and the broker can see it: state and event in, state and outputs out. Pure.

It speaks the agent's protocol with the agent's messages. It has two clocks: the true one, by which everything happens,
and its own, which may lie, and is what it tells. What is left out of the agent: it checks no signatures, decodes no
encodings, keeps to no delivery policy, measures no candidates of a gate, and renews no certificate. Commands and
requests for samples are answered as an agent would, from what it simulates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from agent.commands.ring import LogRing
from agent.protocol.codec import decode
from agent.protocol.commands import Command, CommandAnswer
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    DesiredState,
    Failure,
    Presence,
    Reported,
    TelemetryAck,
    TelemetryBatch,
    TrialPhase,
    TrialReport,
)
from agent.protocol.samples import SampleAck
from agent.protocol.topics import DeviceTopic, is_chunk_topic, parse_chunk_topic, parse_device_topic
from agent.protocol.version import SPOKEN
from agent.update.updater import Record
from fleet_server.simulator.agenda import Agenda
from fleet_server.simulator.behaviours import Effect
from fleet_server.simulator.chances import Purpose, drawn, stream
from fleet_server.simulator.commands import Book, Commands
from fleet_server.simulator.deployments import Deployments
from fleet_server.simulator.inference import Inference
from fleet_server.simulator.outputs import Connect, Cut, Output, Say
from fleet_server.simulator.population import Traits
from fleet_server.simulator.samples import Samples
from fleet_server.simulator.spool import Spool

REPORT_EVERY_S = 300.0
ASKED_TICK_S = 0.5  # while a command or an upload goes on
INTERVAL_S = 10.0  # of telemetry, until the server names another
RETRY_S = 1.0
RETRY_MOST_S = 60.0
HOUR_S, DAY_S = 3600.0, 86_400.0
CUT, OFFLINE, REBOOT = "cut", "offline", "reboot"


class SimulatedDevice:
    """One device. Every method takes the true time, in Unix seconds, and returns what is to be done.

    Args:
        traits: who it is.
        effects: what versions do.
        seed: of the fleet.
        run: names this run: a simulation that starts again is another start of its devices.
        now: when it begins.
        interval_s: of telemetry; None takes the server's word.

    Attributes:
        requests: that its models answered, as its telemetry says.
        windows: telemetry batches that it made.
        acknowledged: of those, how many the server has.
        refused: messages that it could not read.
        activations: how often it let each `model@version` serve.
    """

    def __init__(
        self,
        traits: Traits,
        effects: Sequence[Effect],
        seed: int,
        run: str,
        now: float,
        *,
        interval_s: float | None = None,
    ) -> None:
        self.traits = traits
        self.requests = self.windows = self.acknowledged = self.refused = 0
        self.activations: Counter[str] = Counter()
        self._effects, self._seed, self._run = effects, seed, run
        self._chance = stream(seed, traits.index, Purpose.LIFE)
        self._fixed_interval_s = interval_s
        self._interval_s = interval_s or INTERVAL_S
        self._life = Agenda()  # what happens to it
        self._agenda = Agenda()  # what it does: forgotten when it starts anew
        self._outputs: list[Output] = []
        self._away: set[str] = set()
        self._boots = 1
        self._anew = False
        self._pause_s = RETRY_S
        self._trials: tuple[str, ...] = ()
        self._spool = Spool(self._boot_id)
        self._book, self._log = Book(), LogRing()
        self._asked: np.random.Generator | None = None
        self._asking = False
        self.connected = False
        self._now = now
        self._begin({}, 0, {}, now)
        self._plan_life(now)

    @property
    def device_id(self) -> str:
        """Its id."""
        return self.traits.device_id

    @property
    def next_at(self) -> float:
        """When it wants `tick` to be called, in Unix seconds."""
        return min(self._life.next_at, self._agenda.next_at)

    @property
    def spooled(self) -> int:
        """Telemetry batches that the server has not acknowledged."""
        return len(self._spool)

    def phases(self) -> Iterator[tuple[str, Phase]]:
        """Where its deployments are that the server wants, each with `model@version`."""
        for one in self._deployments.records.values():
            if one.wanted:
                yield f"{one.manifest.model}@{one.manifest.version}", one.phase

    # -- events

    def start(self, now: float) -> list[Output]:
        """It is switched on."""
        self._set(now)
        self._connect()
        return self._done()

    def link_up(self, now: float) -> list[Output]:
        """The broker has accepted the connection."""
        self._set(now)
        if self._away:
            self._put(Cut())
            return self._done()
        self.connected, self._pause_s = True, RETRY_S
        self._spool.pace.link_up()
        self._put(Say(DeviceTopic.PRESENCE, Presence(online=True, boot_id=self._boot_id), retain=True))
        self._deployments.link_up()
        self._samples.link_up()
        self._deployments.changed = True
        return self._done()

    def link_lost(self, now: float) -> list[Output]:
        """The connection ended, or could not be made; it is tried again after a pause that grows."""
        self._set(now)
        self.connected = False
        if not self._away:
            self._agenda.at(now + self._pause_s * float(self._chance.uniform(0.5, 1.0)), self._retry)
            self._pause_s = min(self._pause_s * 2, RETRY_MOST_S)
        return self._done()

    def message(self, topic: str, payload: bytes, now: float) -> list[Output]:
        """A message came."""
        self._set(now)
        try:
            if is_chunk_topic(topic):
                self._deployments.chunk(parse_chunk_topic(topic), payload)
                return self._done()
            leaf = parse_device_topic(topic).leaf
            if leaf is DeviceTopic.DESIRED and payload:
                self._desired(decode(payload, DesiredState))
            elif leaf is DeviceTopic.TELEMETRY_ACK:
                self.acknowledged += self._spool.acknowledge(decode(payload, TelemetryAck))
                self._send_telemetry()
            elif leaf is DeviceTopic.COMMAND:
                self._taking().received(decode(payload, Command), now, now + self._ahead_s)
            elif leaf is DeviceTopic.SAMPLES_ACK:
                self._samples.acknowledged(decode(payload, SampleAck), now)
        except WireError:
            self.refused += 1
        return self._done()

    def tick(self, now: float) -> list[Output]:
        """Time has passed."""
        self._set(now)
        self._life.run(now)
        self._agenda.run(now)
        return self._done()

    def stop(self, now: float) -> list[Output]:
        """It is switched off in order."""
        self._set(now)
        if self.connected:
            self._put(Say(DeviceTopic.PRESENCE, Presence(online=False, boot_id=self._boot_id), retain=True))
        return self._done()

    # -- what the server says

    def _desired(self, state: DesiredState) -> None:
        if self._fixed_interval_s is None and state.telemetry_interval_s != self._interval_s:
            self._interval_s = state.telemetry_interval_s
            self._plan_window(min(self._window_at, self._now + self._interval_s))
        if self._deployments.desired(state):
            self._trials = tuple(one.trial_id for one in state.trials)
            self._samples.desired(state)
        self._deployments.changed = True

    # -- what it does

    def _begin(self, records: dict[str, Record], revision: int, held: dict[str, None], now: float) -> None:
        """It starts, with what an earlier start wrote down."""
        self._sequence = 0
        self._inference = Inference(self.traits, self._effects, self._seed, now, start=self._boots)
        self._deployments = Deployments(
            records,
            revision,
            held,
            self.traits.conduct,
            self._inference,
            self._agenda,
            self._put,
            lambda: self.connected,
            self._note,
            self.activations,
        )
        self._deployments.now = now
        conduct, index = self.traits.conduct, self.traits.index
        self._commands: Commands | None = None
        if self._boots == 1:
            self._samples = Samples(
                conduct.samples,
                self._manifest_of,
                lambda number: stream(self._seed, index, Purpose.SAMPLES, number),
                send=lambda piece: self._put(Say(DeviceTopic.SAMPLES, piece)),
                changed=self._changed,
            )
        self._note("INFO", f"shoal-agent {self.traits.facts.agent_version} (simulated) begins, start {self._boots}")
        self._deployments.recover()
        self._window_from = now
        self._plan_window(now + self._interval_s * float(self._chance.uniform(0.2, 1.0)))
        self._plan_report()

    def _plan_window(self, at: float) -> None:
        self._window_at = at
        self._agenda.at(at, self._window_over, at)

    def _window_over(self, at: float) -> None:
        if at != self._window_at:  # another interval was asked for meanwhile
            return
        now, began = self._now, self._window_from
        models, host = self._inference.collect(now), self._inference.host(now)
        self._samples.saw(models)
        self._window_from = now
        self.windows += 1
        self.requests += sum(one.requests for one in models)
        ahead = self._ahead_s
        self._spool.add(
            lambda spool, sequence: TelemetryBatch(SPOKEN, spool, sequence, began + ahead, now + ahead, models, host)
        )
        self._send_telemetry()
        self._plan_window(now + self._interval_s)

    def _send_telemetry(self) -> None:
        if self.connected:
            for payload in self._spool.due(self._now):
                self._put(Say(DeviceTopic.TELEMETRY, payload))

    def _plan_report(self) -> None:
        self._agenda.at(self._now + REPORT_EVERY_S, self._report_again)

    def _report_again(self) -> None:
        self._deployments.changed = True
        self._plan_report()

    def _report(self) -> None:
        self._deployments.changed = False
        self._sequence += 1
        detail = "it is a simulated device, which measures nothing: leave it out of gate runs"
        failure = Failure(WireErrorCode.MEASURING_FAILED, detail)
        reported = Reported(
            protocol=SPOKEN,
            boot_id=self._boot_id,
            sequence=self._sequence,
            revision=self._deployments.revision,
            facts=self.traits.facts,
            deployments=self._deployments.reports(),
            serving=self._inference.serving,
            sent_at=self._now + self._ahead_s,
            trials=tuple(TrialReport(one, TrialPhase.FAILED, failure=failure) for one in self._trials),
            held=tuple(self._deployments.held)[: LIMITS.held],
            samples=self._samples.report,
        )
        self._put(Say(DeviceTopic.REPORTED, reported))

    # -- what happens to it

    def _plan_life(self, now: float) -> None:
        conduct = self.traits.conduct
        if conduct.cuts_per_hour > 0:
            self._life.at(now + self._wait_s(HOUR_S / conduct.cuts_per_hour), self._is_cut)
        if conduct.reboots_per_day > 0:
            self._life.at(now + self._wait_s(DAY_S / conduct.reboots_per_day), self._falls)
        if conduct.offline is not None:
            # Somewhere in its round when the simulation begins, as if that had gone on for ever.
            since = float(self._chance.uniform(0.0, conduct.offline.every_s))
            if since < conduct.offline.for_s:
                self._away.add(OFFLINE)
                self._life.at(now + conduct.offline.for_s - since, self._back, OFFLINE)
            self._life.at(now + conduct.offline.every_s - since, self._goes_offline)

    def _wait_s(self, mean_s: float) -> float:
        return float(self._chance.exponential(mean_s))

    def _goes_offline(self) -> None:
        offline = self.traits.conduct.offline
        assert offline is not None
        self._leave(OFFLINE, offline.for_s)
        self._life.at(self._now + offline.every_s, self._goes_offline)

    def _is_cut(self) -> None:
        self._leave(CUT, self._wait_s(self.traits.conduct.cut_s))
        self._life.at(self._now + self._wait_s(HOUR_S / self.traits.conduct.cuts_per_hour), self._is_cut)

    def _falls(self) -> None:
        """It ends without a word, and starts anew later."""
        self._agenda.clear()
        self._leave(REBOOT, self.traits.conduct.reboot_s)
        self._life.at(self._now + self._wait_s(DAY_S / self.traits.conduct.reboots_per_day), self._falls)

    def _leave(self, why: str, seconds: float) -> None:
        if why not in self._away:
            self._away.add(why)
            self.connected = False
            self._put(Cut())
            self._life.at(self._now + seconds, self._back, why)

    def _back(self, why: str) -> None:
        self._away.discard(why)
        if why == REBOOT:
            before = self._deployments
            self._boots += 1
            self._anew = True
            self._spool.restarted(self._boot_id)
            self._book.interrupt()
            self._asking = False
            self._begin(before.records, before.revision, before.held, self._now)
        self._connect()

    def _retry(self) -> None:
        if not self.connected:
            self._connect()

    # -- what it is asked for

    def _look_after(self) -> None:
        """While something goes on that it was asked for, look at it again and again."""
        if not self._asking and self.connected and (self._busy or self._samples.busy):
            self._asking = True
            self._agenda.at(self._now + ASKED_TICK_S, self._go_on)

    @property
    def _busy(self) -> bool:
        return self._commands is not None and self._commands.busy

    def _taking(self) -> Commands:
        """Who takes commands, made when the first one comes: of most devices nobody ever asks anything."""
        if self._commands is None:
            conduct = self.traits.conduct
            self._commands = Commands(
                self._book,
                self._log,
                self.traits.facts.commands,
                conduct.commands,
                self._inference,
                drawn(conduct.load_s),
                self._draw,
                report=self._report,
                restart=self._deployments.restart_worker,
                say=lambda answer: self._tell(DeviceTopic.COMMAND_ANSWER, answer),
            )
        return self._commands

    def _draw(self) -> float:
        """For commands, the same numbers with every run of a seed."""
        if self._asked is None:
            self._asked = stream(self._seed, self.traits.index, Purpose.COMMANDS)
        return float(self._asked.random())

    def _go_on(self) -> None:
        self._asking = False
        if self._commands is not None:
            self._commands.tick(self._now)
        if self.connected:
            self._samples.tick(self._now, self._now + self._ahead_s)

    # -- helpers

    def _tell(self, leaf: DeviceTopic, message: CommandAnswer) -> bool:
        """Say something; false where there is no connection."""
        if self.connected:
            self._put(Say(leaf, message))
        return self.connected

    def _note(self, level: str, text: str) -> None:
        self._log.add(self._now + self._ahead_s, level, "agent", "agent", text)

    def _manifest_of(self, model: str) -> Manifest | None:
        return self._inference.manifest_of(model)  # of the worker that there is now

    def _changed(self) -> None:
        self._deployments.changed = True

    def _connect(self) -> None:
        if not self._away:
            self._put(Connect(self._boot_id, anew=self._anew))
            self._anew = False

    @property
    def _boot_id(self) -> str:
        """Of this start, and of the spool that it makes; unlike that of any other run."""
        return f"{self._run}-{self._boots}"

    @property
    def _ahead_s(self) -> float:
        return drawn(self.traits.conduct.clock_offset_s)

    def _set(self, now: float) -> None:
        self._now = self._deployments.now = now

    def _put(self, output: Output) -> None:
        self._outputs.append(output)

    def _done(self) -> list[Output]:
        if self._deployments.changed and self.connected:
            self._report()
        self._look_after()
        outputs, self._outputs = self._outputs, []
        return outputs
