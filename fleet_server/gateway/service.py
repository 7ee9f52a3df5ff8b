"""The gateway: the threads between the broker and the services."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from agent.protocol.topics import FROM_DEVICE, SHARDS, DeviceTopic, every_shard_filter, shard_filter
from fleet_server import outbox
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import UNAVAILABLE, Database
from fleet_server.enrolment.ids import server_name
from fleet_server.enrolment.service import Authority
from fleet_server.gateway.broker import EmbeddedBroker
from fleet_server.gateway.broker_files import BrokerFiles
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.device_shards import DeviceShards
from fleet_server.gateway.handlers import Handlers, is_report, is_telemetry
from fleet_server.gateway.inbox import FairInbox, Message
from fleet_server.gateway.lockout import Lockout
from fleet_server.gateway.mqtt import MqttLink
from fleet_server.gateway.publishing import spans_of
from fleet_server.inferences.dispatch import Dispatch
from fleet_server.instruments import Instruments
from fleet_server.outbox import PendingMessage
from fleet_server.rollouts.reminder import tell_again
from fleet_server.samples.receiving import Receiving
from fleet_server.samples.schemas import SAMPLES_FOLDER
from fleet_server.servers import Membership
from fleet_server.settings import Settings
from fleet_server.spans import Sink

log = logging.getLogger(__name__)
OUTBOX_POLL_S = 0.1
OUTBOX_BATCH = 200
LOCKOUT_POLL_S = 1.0
SHARDS_EVERY_S = 1.0
SETTLE_S = 1.5  # after a node has confirmed a subscription; the others of its cluster hear of it a moment later
LEAVE_S = 8.0  # how long a server that ends waits for others to hear its devices
# Heard by every server: whoever sends a content sends it to devices of all, and must know who is gone.
BY_ALL = frozenset({DeviceTopic.NEED, DeviceTopic.PRESENCE})
BY_ONE = FROM_DEVICE - BY_ALL - {DeviceTopic.INFERRED}
INBOX_WAIT_S = 0.5
TRIES = 20
LONGEST_PAUSE_S = 5.0
COMPLAIN_EVERY_S = 60.0
GROUP_BYTES = 4 << 20  # of messages that are handled together


class Gateway:
    """Starts and stops the broker (when it is embedded), the link, and the threads that serve it."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        artifacts: ArtifactStore,
        authority: Authority,
        instruments: Instruments | None = None,
        export: Sink | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._export = export
        self._database = database
        self._settings = settings
        self._shards = DeviceShards(database, membership or Membership(database))
        self._instruments = instruments or Instruments()
        number = membership.number if membership is not None else 1
        files = BrokerFiles(settings, authority.ca, number)
        self._broker = EmbeddedBroker(settings, files) if settings.broker_url is None else None
        self._lockout = Lockout(settings, database, files, self._broker)
        self._conduct = Conduct(database)
        self._inbox = FairInbox(self._flooded, whole=is_report, kept=is_telemetry)
        self._overflowed, self._complain_at = 0, 0.0
        self._dropped = 0  # of those that overflowed, how many are counted
        self._link = MqttLink(
            settings.effective_broker_url,
            server_name(number),
            (),
            self._take,
            self._lockout.context,
            possible=_filters(frozenset(range(SHARDS)), whole=False) | _filters(frozenset(), whole=True),
        )
        self.dispatch = Dispatch(self._link.publish, self._link.listen)
        self._delivery = Delivery(artifacts, self._link.publish, settings.delivery_rate)
        receiving = Receiving(database, artifacts.below(SAMPLES_FOLDER), settings.state_dir)
        self._handlers = Handlers(
            database,
            settings,
            self._delivery,
            authority,
            self._conduct,
            receiving,
            self._link.publish,
            self._instruments,
            self._shards,
        )
        self._instruments.watch(
            "shoal_inbox_messages", "Messages that wait to be handled.", lambda: self._inbox.waiting
        )
        self._instruments.watch("shoal_inbox_bytes", "How large those are.", lambda: self._inbox.waiting_bytes)
        self._instruments.watch(
            "shoal_broker_connected", "Whether the broker has accepted the connection.", lambda: self.connected
        )
        self._acknowledged: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._leaving = threading.Event()
        self._settled_at = 0.0
        # What the link's `forgotten` was when devices were asked again; None before that: what this server had taken
        # and not handled when it last ended went with it.
        self._caught_up: int | None = None
        self._threads: list[threading.Thread] = []

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._link.connected

    @property
    def broker_pid(self) -> int | None:
        """Of the embedded broker."""
        return self._broker.pid if self._broker is not None else None

    def start(self) -> None:
        """Start everything; the broker first.

        Raises:
            UnavailableError: when the embedded broker can't start.
        """
        self._share_out()
        self._lockout.prepare()
        if self._broker is not None:
            self._broker.start()
        self._link.start()
        for name, step in (
            ("gateway-handler", self._handle_next),
            ("gateway-outbox", self._publish_pending),
            ("gateway-streamer", self._delivery.step),
            ("gateway-lockout", self._keep_out),
            ("gateway-shards", self._share_out_again),
        ):
            thread = threading.Thread(target=self._forever, args=(name, step), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop everything; the broker last. Where there are other servers, devices are theirs first."""
        self._leave()
        self._stopping.set()
        for thread in self._threads:
            thread.join(10)
        self._link.stop()
        if self._broker is not None:
            self._broker.stop()

    def _forever(self, name: str, step: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                step()
            except Exception:
                log.exception("%s failed; it goes on", name)
                self._stopping.wait(1.0)

    def _handle_next(self) -> None:
        """One message, with those that wait and are handled together with it.

        Nothing is waited for: while a group is being stored, the next one gathers.
        """
        message = self._inbox.get(INBOX_WAIT_S)
        if message is None:
            return
        group = self._handlers.group_of(message)
        if group is None:
            self._insist(lambda: self._handlers.handle(message))
            return
        whole = [message, *self._inbox.get_more(group.has, limit=group.most - 1, limit_bytes=GROUP_BYTES)]
        if group.insists:
            self._insist(lambda: group.handle(whole))
        else:
            group.handle(whole)

    def _insist(self, handle: Callable[[], None]) -> None:
        """Again and again while the database does not work: devices would say the same again only in minutes."""
        for tries in range(TRIES):
            try:
                handle()
            except UNAVAILABLE as error:
                if tries == TRIES - 1:
                    raise
                log.warning("the database does not work; a message waits for it: %s", str(error)[:200])
                if self._stopping.wait(min(0.5 * 2**tries, LONGEST_PAUSE_S)):
                    return
            else:
                return

    def _take(self, message: Message) -> None:
        """Called from the link's thread. Answers to parts wait for no other messages: a request waits for them."""
        if not self.dispatch.hear(message.topic, message.payload):
            self._inbox.put(message)

    def _flooded(self, device_id: str) -> None:
        """Called from the link's thread."""
        self._instruments.dropped.labels("share").inc()
        self._conduct.flooded(device_id)

    def _count_dropped(self) -> None:
        dropped = self._inbox.overflowed
        self._instruments.dropped.labels("full").inc(dropped - self._dropped)
        self._dropped = dropped

    def _complain(self) -> None:
        """Once a minute at most, when messages find no room."""
        dropped, now = self._inbox.overflowed, time.monotonic()
        if dropped > self._overflowed and now >= self._complain_at:
            log.warning(
                "this server is behind: %d messages of devices found no room and were dropped; devices say again what "
                "matters. Send telemetry less often (SHOAL_TELEMETRY_INTERVAL_S), or give the server more processors",
                dropped - self._overflowed,
            )
            self._overflowed, self._complain_at = dropped, now + COMPLAIN_EVERY_S

    def _keep_out(self) -> None:
        self._count_dropped()
        self._complain()
        self._conduct.write()
        self._lockout.step()
        self._stopping.wait(LOCKOUT_POLL_S)

    # -- several servers

    def _share_out(self) -> None:
        """See which devices are this server's, and hear those."""
        held = self._shards.held
        orphaned = self._shards.step()
        if self._shards.held != held:
            self._delivery.keep(self._shards.streams)
        heard = self._shards.heard
        self._link.want(_filters(heard, whole=self._shards.alone and len(heard) == SHARDS))
        if orphaned:
            # What they said when their server had ended went to its session alone.
            self._link.hear_again([shard_filter(shard, DeviceTopic.PRESENCE) for shard in orphaned])
            told = tell_again(self._database, self._settings, orphaned)
            log.warning("took over %d shards of a server that ended; asked %d devices again", len(orphaned), told)
        if self._link.settled and self._link.forgotten != self._caught_up:
            self._caught_up = self._link.forgotten
            tell_again(self._database, self._settings, self._shards.held)
        if not (self._shards.unconfirmed and self._link.settled):
            self._settled_at = time.monotonic()
        elif time.monotonic() - self._settled_at >= SETTLE_S:
            self._shards.confirm()

    def _share_out_again(self) -> None:
        if not self._stopping.wait(SHARDS_EVERY_S) and not self._leaving.is_set():
            self._share_out()

    def _leave(self) -> None:
        """Give the devices to other servers, where there are some, and hear them until those do."""
        self._leaving.set()
        try:
            self._shards.leave()
            deadline = time.monotonic() + LEAVE_S
            while not self._shards.alone and self._shards.given and time.monotonic() < deadline:
                time.sleep(OUTBOX_POLL_S)
                self._shards.follow()
            if not self._shards.alone:
                self._link.want(())  # its session takes nothing more: nobody would come for it
            while self._inbox.waiting and time.monotonic() < deadline:
                time.sleep(OUTBOX_POLL_S)
        except UNAVAILABLE as error:
            log.warning("the database does not work: others will find out that this server ended: %s", str(error)[:200])

    def _publish_pending(self) -> None:
        """Send what the outbox holds for this server's devices, oldest first; rows go when the broker has them."""
        shards = self._shards.sure
        if not self._link.connected or not shards or not self._database.finds(outbox.HAS_MESSAGES):
            self._stopping.wait(OUTBOX_POLL_S)
            return
        with self._database.read() as session:
            messages = outbox.pending(session, limit=OUTBOX_BATCH, shards=shards)
        sent: dict[str, tuple[PendingMessage, float]] = {}
        for message in messages:
            if self._link.publish(
                message.topic,
                message.payload,
                retain=message.retain,
                acknowledged=lambda key=message.id: self._acknowledged.put(key),  # type: ignore[misc]
            ):
                sent[message.id] = (message, time.time())
        self._forget_acknowledged(sent)
        if not messages:
            self._stopping.wait(OUTBOX_POLL_S)

    def _forget_acknowledged(self, sent: dict[str, tuple[PendingMessage, float]]) -> None:
        """Wait a moment for what was sent; what stays is sent again, which is harmless."""
        done = []
        deadline = time.monotonic() + 5.0
        while sent and time.monotonic() < deadline and self._link.connected:
            try:
                key = self._acknowledged.get(timeout=0.2)
            except queue.Empty:
                continue
            done.append(key)
            published = sent.pop(key, None)
            if published is not None and self._export is not None:
                self._export(spans_of(*published))
        if done:
            with self._database.write() as session:
                outbox.acknowledge(session, done)


def _filters(shards: frozenset[int], *, whole: bool) -> frozenset[str]:
    """What a server subscribes to that handles the messages of some shards, or of all of them."""
    every = FROM_DEVICE - {DeviceTopic.INFERRED} if whole else BY_ALL
    of_shards = () if whole else shards
    return frozenset(map(every_shard_filter, every)) | {shard_filter(one, leaf) for one in of_shards for leaf in BY_ONE}
