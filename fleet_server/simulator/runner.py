"""Carries out what simulated devices want: one event loop, in a thread of its own, for thousands of connections.

It knows no rules of devices: it takes their outputs, brings them what comes, and calls them when they want to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import resource
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from agent.protocol.brokers import BrokerAddresses, BrokerChoice, read_brokers
from agent.protocol.codec import encode
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import Presence
from agent.protocol.topics import TO_DEVICE, DeviceTopic, broadcast_filter, client_id, device_topic, repair_filter
from fleet_server.simulator import packets
from fleet_server.simulator.behaviours import Effect
from fleet_server.simulator.connection import KEEPALIVE_S, Connection, Session
from fleet_server.simulator.device import SimulatedDevice
from fleet_server.simulator.identities import Identities, IdentitiesError
from fleet_server.simulator.outputs import Connect, Cut, Listen, Output, Say
from fleet_server.simulator.population import Traits

CONNECT_PER_S = 200.0
CONNECTORS = 64
CONNECT_TIMEOUT_S = 20.0
LOOK_S = 0.05
KEEP_S = 5.0
STOP_S = 5.0
AT_ONCE = 200
SPARE_FILES = 64


class SimulationError(Exception):
    """The simulation can't run; the message says what would mend it."""


def _brokers(url: str) -> BrokerAddresses:
    """Where devices connect to.

    Raises:
        SimulationError: when it is not `mqtt://host:port` or `mqtts://host:port`.
    """
    try:
        return read_brokers(url)
    except ValueError:
        detail = f"{url[:200]!r} is no broker: write mqtt://host:port or mqtts://host:port"
        raise SimulationError(detail) from None


@dataclass(frozen=True)
class Counts:
    """How a simulation is.

    Attributes:
        devices: that are simulated.
        connected: of those.
        phases: how many deployments that the server wants are in each phase, by `model@version`.
        activations: how often devices let a version serve, by `model@version`; more than once on some where `repeated`.
        repeated: devices that let a version serve more than once; those that started anew count too.
        sent: messages that were published.
        received: messages that came.
        requests: that models answered, as far as telemetry tells of them.
        windows: telemetry batches that were made.
        acknowledged: of those, how many the server has stored.
        spooled: of those, how many wait.
        broken: connections that ended without the device's doing, or were not made.
        refused: messages that devices could not read.
        problem: the last reason for a broken connection; empty when there was none.
    """

    devices: int = 0
    connected: int = 0
    phases: dict[str, dict[Phase, int]] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    sent: int = 0
    received: int = 0
    requests: int = 0
    windows: int = 0
    acknowledged: int = 0
    spooled: int = 0
    broken: int = 0
    refused: int = 0
    problem: str = ""


class Simulation:
    """Simulated devices; used as a context, in which they run.

    Args:
        broker: URL of the fleet's broker, `mqtt://host:port` or `mqtts://host:port`; several by commas are nodes of a
            cluster, and each is the first of an equal share of the devices.
        population: the devices.
        effects: what versions do to them.
        seed: of everything that is left to chance.
        interval_s: of telemetry; None takes the server's word.
        connect_per_s: connections a second that are begun.
        qos: at which devices subscribe to their topics: 1 as agents do by MQTT 5, 0 as they do by 3.1.1.
        source: local address that connections are made from: one has 28,000 ports to one broker.
        identities: the devices' certificates, for a broker that is asked by TLS.

    Raises:
        SimulationError: when this process may not have so many connections, or the URL is of no broker.
    """

    def __init__(
        self,
        broker: str,
        population: Sequence[Traits],
        effects: Sequence[Effect] = (),
        *,
        seed: int = 0,
        interval_s: float | None = None,
        connect_per_s: float = CONNECT_PER_S,
        qos: int = 1,
        source: str | None = None,
        identities: Identities | None = None,
    ) -> None:
        self._brokers = _brokers(broker)
        self._identities = identities
        if self._brokers.tls and identities is None:
            raise SimulationError(
                f"{broker}: devices need certificates there: give --identities and --enroll, let the server's broker "
                "take everybody (SHOAL_BROKER_TLS=false), or name a listener without TLS, mqtt://host:port"
            )
        self._population = population
        self._effects = effects
        self._seed = seed
        self._interval_s = interval_s
        self._connect_per_s = connect_per_s
        self.qos = qos
        self._source = (source, 0) if source else None
        self._links: list[_Link] = []
        self._due: list[tuple[float, int]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="simulation", daemon=True)
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._last = Counts(devices=len(population))
        _allow_files(len(population) + SPARE_FILES)

    def __enter__(self) -> Self:
        """Switch the devices on."""
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Switch the devices off, in order."""
        self.stop()

    def stop(self) -> Counts:
        """Switch the devices off, in order; returns how they were.

        Raises:
            SimulationError: when the simulation itself has failed.
        """
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended by itself just now
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._raise()
        return self._last

    def counts(self) -> Counts:
        """How they are.

        Raises:
            SimulationError: when the simulation itself has failed.
        """
        self._raise()
        if self._loop is None or not self._thread.is_alive():
            return self._last
        counting = self._counted()
        try:
            return asyncio.run_coroutine_threadsafe(counting, self._loop).result()
        except (RuntimeError, CancelledError):  # it ended just now
            counting.close()
            return self._last

    def _raise(self) -> None:
        if self._error is not None:
            raise SimulationError(f"the simulation failed: {self._error!r}") from self._error

    # -- in the thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody asks)
            self._error = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._waiting: asyncio.Queue[_Link] = asyncio.Queue()
        self._connect_at = self._loop.time()
        self._began = time.time() - self._loop.time()
        run = uuid.uuid4().hex[:16]
        for number, traits in enumerate(self._population):
            device = SimulatedDevice(traits, self._effects, self._seed, run, self.now(), interval_s=self._interval_s)
            self._links.append(_Link(self, number, device, BrokerChoice(self._brokers, start=number)))
        workers = [asyncio.create_task(self._connector()) for _ in range(min(CONNECTORS, len(self._links)))]
        workers += [asyncio.create_task(self._keep()), asyncio.create_task(self._live())]
        self._started.set()
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([stopping, *workers], return_when=asyncio.FIRST_COMPLETED)
        failed = [one.exception() for one in workers if one.done() and not one.cancelled()]
        for one in (stopping, *workers):
            one.cancel()
        self._last = await self._counted()
        await self._switch_off()
        if failed and failed[0] is not None:
            raise failed[0]

    def now(self) -> float:
        """Unix seconds, by a clock that is never set."""
        return self._began + asyncio.get_running_loop().time()

    async def _live(self) -> None:
        """Call every device when it wants to be."""
        for number, link in enumerate(self._links):
            link.do(lambda now, device=link.device: device.start(now))  # type: ignore[misc]
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
        while True:
            now, called = self.now(), 0
            while self._due and self._due[0][0] <= now:
                at, number = heapq.heappop(self._due)
                link = self._links[number]
                if at == link.called_at:
                    link.called_at = float("inf")
                    link.do(link.device.tick)
                    called += 1
                    if called % AT_ONCE == 0:
                        await asyncio.sleep(0)
            await asyncio.sleep(LOOK_S)

    def call(self, link: _Link) -> None:
        """See that a device is called when it wants to be."""
        at = link.device.next_at
        if at < link.called_at:
            link.called_at = at
            heapq.heappush(self._due, (at, link.number))

    def connect(self, link: _Link) -> None:
        """Connect a device when it is its turn."""
        self._waiting.put_nowait(link)

    async def _connector(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            link = await self._waiting.get()
            self._connect_at = max(self._connect_at + 1 / self._connect_per_s, loop.time())
            await asyncio.sleep(self._connect_at - loop.time())
            if not link.wanted or link.connection is not None:
                continue
            attempt = link.attempt
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await loop.create_connection(
                        link.new_connection,
                        *link.places.place,
                        local_addr=self._source,
                        ssl=self._context(link.device.device_id),
                    )
            except (OSError, TimeoutError, IdentitiesError) as error:
                if link.attempt == attempt:
                    link.lost(str(error) or f"the broker did not answer for {CONNECT_TIMEOUT_S:.0f} s")

    def _context(self, device_id: str) -> ssl.SSLContext | None:
        return self._identities.context(device_id) if self._brokers.tls and self._identities is not None else None

    def hello(self, device_id: str, boot_id: str) -> bytes:
        """A device's CONNECT."""
        will = packets.Will(
            device_topic(device_id, DeviceTopic.PRESENCE), encode(Presence(online=False, boot_id=boot_id))
        )
        return packets.connect(
            f"shoal-{client_id(device_id)}",
            will,
            keepalive_s=KEEPALIVE_S,
            user=self._brokers.user,
            password=self._brokers.password,
        )

    async def _keep(self) -> None:
        """Ping where nothing is said."""
        while True:
            await asyncio.sleep(KEEP_S)
            now = asyncio.get_running_loop().time()
            for number, link in enumerate(self._links):
                if link.connection is not None:
                    link.connection.keep(now)
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def _switch_off(self) -> None:
        for number, link in enumerate(self._links):
            link.do(link.device.stop)
            if link.connection is not None:
                link.connection.close()
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
        deadline = asyncio.get_running_loop().time() + STOP_S
        while any(link.connection is not None and not link.connection.closed for link in self._links):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(LOOK_S)

    async def _counted(self) -> Counts:
        phases: dict[str, Counter[Phase]] = {}
        devices = [link.device for link in self._links]
        activations: Counter[str] = Counter()
        for device in devices:
            activations.update(device.activations)
        for device in devices:
            for version, phase in device.phases():
                phases.setdefault(version, Counter())[phase] += 1
        return Counts(
            devices=len(devices),
            connected=sum(one.connected for one in devices),
            phases={version: dict(found) for version, found in sorted(phases.items())},
            activations=dict(sorted(activations.items())),
            repeated=sum(max(one.activations.values(), default=0) > 1 for one in devices),
            sent=sum(link.sent for link in self._links),
            received=sum(link.got for link in self._links),
            requests=sum(one.requests for one in devices),
            windows=sum(one.windows for one in devices),
            acknowledged=sum(one.acknowledged for one in devices),
            spooled=sum(one.spooled for one in devices),
            broken=sum(link.broken for link in self._links),
            refused=sum(one.refused for one in devices),
            problem=next((link.problem for link in self._links if link.problem), ""),
        )


class _Link:
    """A device and its connection."""

    __slots__ = (
        "_boot_id",
        "_session",
        "_simulation",
        "attempt",
        "broken",
        "called_at",
        "connection",
        "device",
        "got",
        "number",
        "places",
        "problem",
        "sent",
        "wanted",
    )

    def __init__(self, simulation: Simulation, number: int, device: SimulatedDevice, places: BrokerChoice) -> None:
        self._simulation = simulation
        self._session = Session()
        self._boot_id = ""
        self.number = number
        self.device = device
        self.places = places
        self.connection: Connection | None = None
        self.called_at = float("inf")
        self.wanted = False
        self.attempt = self.sent = self.got = self.broken = 0
        self.problem = ""

    def do(self, event: Callable[[float], list[Output]]) -> None:
        """Bring the device an event, and carry out what it wants."""
        for output in event(self._simulation.now()):
            self._carry_out(output)
        self._simulation.call(self)

    def new_connection(self) -> Connection:
        """One that says hello; the event loop asks for it when the broker can be reached."""
        self.attempt += 1
        hello = self._simulation.hello(self.device.device_id, self._boot_id)
        connection = Connection(self._session, hello, _Attempt(self, self.attempt))
        self.connection = connection
        return connection

    def up(self) -> None:
        """The broker has accepted the connection."""
        assert self.connection is not None
        own = self.device.device_id
        qos = self._simulation.qos
        filters = [(device_topic(own, leaf), qos) for leaf in sorted(TO_DEVICE)]
        self.connection.subscribe([*filters, (repair_filter(own), qos)])
        self.places.accepted()
        self.problem = ""
        self.do(self.device.link_up)

    def received(self, topic: str, payload: bytes) -> None:
        """A message came."""
        self.got += 1
        self.do(lambda now: self.device.message(topic, payload, now))

    def lost(self, reason: str) -> None:
        """There is no connection."""
        self.connection, self.problem = None, reason
        self.broken += 1
        self.places.ended()
        self.do(self.device.link_lost)

    def _carry_out(self, output: Output) -> None:
        match output:
            case Connect():
                self._boot_id, self.wanted = output.boot_id, True
                if output.anew:
                    self._session = Session()
                self._simulation.connect(self)
            case Cut():
                self.wanted = False
                self.attempt += 1
                if self.connection is not None:
                    self.connection.cut()
                    self.connection = None
            case Say() if self.connection is not None:
                message = output.message
                payload = message if isinstance(message, bytes) else encode(message)
                self.sent += 1
                topic = device_topic(self.device.device_id, output.leaf)
                self.connection.publish(topic, payload, retain=output.retain)
            case Listen() if self.connection is not None:
                wanted = broadcast_filter(output.digest)
                if output.on:
                    self.connection.subscribe([(wanted, 0)])
                else:
                    self.connection.unsubscribe([wanted])
            case _:
                pass


class _Attempt:
    """The owner of one connection; what an earlier one says counts no more."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: _Link, number: int) -> None:
        self._link = link
        self._number = number

    def connected(self) -> None:
        if self._number == self._link.attempt:
            self._link.up()

    def received(self, topic: str, payload: bytes) -> None:
        if self._number == self._link.attempt:
            self._link.received(topic, payload)

    def lost(self, reason: str) -> None:
        if self._number == self._link.attempt:
            self._link.lost(reason)


def _allow_files(wanted: int) -> None:
    """A connection is an open file.

    Raises:
        SimulationError: when the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SimulationError(
            f"this process may open {hard} files, and {wanted} are needed: raise the limit (`ulimit -Hn`), or simulate "
            "the fleet in several processes (--first)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
