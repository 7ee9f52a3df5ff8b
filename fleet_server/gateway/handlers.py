"""From a device's message to the services: each in one transaction. Whatever the bytes, nothing escapes but the log."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

from sqlalchemy.orm import Session

from agent.protocol.codec import MessageT, decode, encode
from agent.protocol.commands import CommandAnswer
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.logs import log_ids
from agent.protocol.messages import (
    Certificate,
    DesiredState,
    Failure,
    Need,
    Presence,
    Renew,
    Reported,
    SourceNeed,
    SourceOffer,
    TelemetryAck,
    TelemetryBatch,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.samples import SamplePiece
from agent.protocol.topics import DeviceTopic, ParsedDeviceTopic, device_topic, parse_device_topic
from agent.protocol.version import SPOKEN
from fleet_server import outbox
from fleet_server.clock import utc_now
from fleet_server.commands import receiving as commands
from fleet_server.commands.sending import send_open
from fleet_server.db import Database
from fleet_server.devices import reports as device_reports
from fleet_server.enrolment import service as enrolment
from fleet_server.enrolment.service import Authority
from fleet_server.errors import FleetError
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.inbox import Message, sender_of
from fleet_server.gateway.needs import Needs, entitled
from fleet_server.gateway.reports import Reports
from fleet_server.instruments import Instruments
from fleet_server.models import Device, DeviceIdentity
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.samples.receiving import Receiving
from fleet_server.settings import Settings
from fleet_server.telemetry.ingest import Ingest, Sent
from fleet_server.trust import service as trust
from fleet_server.trust.tickets import LIFETIME_S, TicketDesk

log = logging.getLogger(__name__)
COMPLAIN_EVERY_S = 60.0
BATCHES = 1000  # of telemetry, of one transaction
NO_KEY = "0" * 64
_TELEMETRY, _REPORTED = (f"/{leaf}" for leaf in (DeviceTopic.TELEMETRY, DeviceTopic.REPORTED))


@dataclass(frozen=True)
class Group:
    """Messages of one kind that are handled together: the database does for many what it does for one.

    Attributes:
        has: whether a message is one of them.
        most: how many are handled together.
        handle: handles them.
        insists: whether they are to be tried again while the database does not work; else devices say them again.
    """

    has: Callable[[Message], bool]
    most: int
    handle: Callable[[Sequence[Message]], None]
    insists: bool = True


class Shards(Protocol):
    """Which devices and contents are this server's, of several."""

    def hears(self, device_id: str) -> bool:
        """Whether a device's messages are this server's to handle."""
        ...

    def streams(self, digest: str) -> bool:
        """Whether a content is this server's to send."""
        ...


class _Every:
    """All are."""

    def hears(self, _device_id: str) -> bool:
        return True

    def streams(self, _digest: str) -> bool:
        return True


class Handlers:
    """Handles messages from devices.

    Args:
        database: where everything goes.
        settings: what devices are told.
        delivery: takes devices' needs of what they are entitled to.
        authority: renews certificates.
        conduct: notes devices that send what can't be read.
        receiving: takes the files of samples.
        send: publishes an answer that is read, not changed: the device asks again for what is lost.
        instruments: count what is handled.
        shards: which devices and contents are this server's; all when absent.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        delivery: Delivery,
        authority: Authority,
        conduct: Conduct,
        receiving: Receiving,
        send: Callable[[str, bytes], object],
        instruments: Instruments | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._instruments = instruments or Instruments()
        self._shards = shards or _Every()
        self._database = database
        self._authority = authority
        self._conduct = conduct
        self._receiving = receiving
        self._settings = settings
        self._delivery = delivery
        self._needs = Needs(database, delivery, self._shards.streams)
        self._reports = Reports(database, settings)
        self._send = send
        self._complained: dict[str, float] = {}
        self._tickets = TicketDesk(authority.ca)
        self._ingest = Ingest(database)
        self._groups = (
            Group(is_telemetry, BATCHES, self.handle_telemetry, insists=False),
            Group(is_report, 100, self.handle_reports),  # some take milliseconds, and others wait
            Group(_of(DeviceTopic.PRESENCE), 500, self.handle_presence),
            Group(_of(DeviceTopic.NEED), 1000, self.handle_needs),
        )

    def group_of(self, message: Message) -> Group | None:
        """What a message is handled together with; None when it is handled alone."""
        return next((one for one in self._groups if one.has(message)), None)

    def handle(self, message: Message) -> None:
        """Handle one message."""
        group = self.group_of(message)
        if group is not None:
            group.handle([message])
            return
        try:
            topic = parse_device_topic(message.topic)
            with self._instruments.timed_handling(topic.leaf.value, 1), log_ids(device=topic.device_id):
                self._dispatch(topic, message)
        except WireError as error:
            self._refuse(message, error)

    def handle_telemetry(self, messages: Sequence[Message]) -> None:
        """Store batches in as few transactions as there can be, and acknowledge those that are in the database then.

        An acknowledgement that is lost does no harm, the batch comes again: so it needs no row in the outbox.
        """
        with self._instruments.timed_handling(DeviceTopic.TELEMETRY.value, len(messages)):
            self._store_telemetry(messages)

    def _store_telemetry(self, messages: Sequence[Message]) -> None:
        sent = [Sent(*one) for message in messages if (one := self._decoded(message, TelemetryBatch))]
        by_spool: dict[tuple[str, str], set[int]] = defaultdict(set)
        stored = self._ingest.store(sent)
        for one in stored:
            by_spool[one.device_id, one.batch.spool_id].add(one.batch.sequence)
        windows = [window for one in stored for window in one.batch.models]
        self._instruments.batches.inc(len(stored))
        self._instruments.windows.inc(len(windows))
        self._instruments.inferences.inc(sum(window.requests for window in windows))
        for (device_id, spool_id), sequences in by_spool.items():
            ack = TelemetryAck(spool_id=spool_id, sequences=tuple(sorted(sequences)))
            if self._send(device_topic(device_id, DeviceTopic.TELEMETRY_ACK), encode(ack)) is False:
                break  # no connection: nor would the others go out

    def handle_reports(self, messages: Sequence[Message]) -> None:
        """Take in reports, in one transaction."""
        with self._instruments.timed_handling(DeviceTopic.REPORTED.value, len(messages)):
            said = [one for message in messages if (one := self._decoded(message, Reported))]
            if said:
                self._reports.take(said)

    def handle_presence(self, messages: Sequence[Message]) -> None:
        """Note who is connected, in one transaction: a broker says it of all devices when a server connects."""
        with self._instruments.timed_handling(DeviceTopic.PRESENCE.value, len(messages)):
            self._note_presence(messages)

    def _note_presence(self, messages: Sequence[Message]) -> None:
        said: list[tuple[str, Presence]] = []
        kept: set[str] = set()  # who is connected, as the broker remembers
        for message in messages:
            if message.payload and (one := self._decoded(message, Presence)):
                said.append(one)
                if message.retained and one[1].online:
                    kept.add(one[0])
        ours = [(device_id, one) for device_id, one in said if self._shards.hears(device_id)]
        known, out = self._record_presence(ours) if ours else (set(), set())
        for device_id, presence in said:
            # Another server writes down what it is not ours to; but each may be sending contents to the device.
            if not presence.online and device_id not in out:
                self._delivery.forget(device_id)
        # They reported when nobody listened: whatever they are told to run, they answer with a report.
        nothing_new = DesiredState(SPOKEN, DEFAULT_FLEET, 0, telemetry_interval_s=self._settings.telemetry_interval_s)
        for device_id in sorted(kept.intersection(device_id for device_id, _ in ours) - known - out):
            self._send(device_topic(device_id, DeviceTopic.DESIRED), encode(nothing_new))

    def _record_presence(self, said: Sequence[tuple[str, Presence]]) -> tuple[set[str], set[str]]:
        """Who of them is known, and who is locked out."""
        with self._database.write() as session:
            out = enrolment.locked_out(session, sorted({device_id for device_id, _ in said}))
            heard = [(device_id, presence) for device_id, presence in said if device_id not in out]
            known = device_reports.record_presence(session, heard, utc_now())
            online = known.intersection(device_id for device_id, presence in heard if presence.online)
            session.flush()  # so that the rows of devices are locked before those of their commands, as elsewhere
            send_open(session, sorted(online), utc_now())
        return known, out

    def handle_needs(self, messages: Sequence[Message]) -> None:
        """Take in what devices lack, and let them have it where they may; the database is asked once for many."""
        with self._instruments.timed_handling(DeviceTopic.NEED.value, len(messages)):
            self._needs.take([one for message in messages if (one := self._decoded(message, Need))])

    def _decoded(self, message: Message, kind: type[MessageT]) -> tuple[str, MessageT] | None:
        """The device that a message is of, and what it says; None when it can't be read, which is noted."""
        try:
            return parse_device_topic(message.topic).device_id, decode(message.payload, kind)
        except WireError as error:
            self._refuse(message, error)
            return None

    def _refuse(self, message: Message, error: WireError) -> None:
        self._instruments.refused.inc()
        self._conduct.malformed(sender_of(message.topic), f"{message.topic[:100]}: {error}")
        self._complain(message.topic, error)

    def _dispatch(self, topic: ParsedDeviceTopic, message: Message) -> None:
        payload = message.payload
        with self._database.read() as session:
            if enrolment.is_locked_out(session, topic.device_id):
                return
        match topic.leaf:
            case DeviceTopic.RENEW:
                self._renew(topic.device_id, decode(payload, Renew))
            case DeviceTopic.TRUST_NEED:
                self._trust_need(topic.device_id, decode(payload, TrustNeed))
            case DeviceTopic.SAMPLES:
                self._samples(topic.device_id, decode(payload, SamplePiece))
            case DeviceTopic.COMMAND_ANSWER:
                self._command(topic.device_id, decode(payload, CommandAnswer))
            case DeviceTopic.SOURCE_NEED:
                self._source_need(topic.device_id, decode(payload, SourceNeed))
            case _:
                pass

    def _source_need(self, device_id: str, need: SourceNeed) -> None:
        """Where it may fetch the same over HTTP, where the settings say so."""
        with self._database.read() as session:
            content = entitled(session, {(device_id, need.digest)}).get((device_id, need.digest))
        offer = SourceOffer(need.digest)
        if content is not None and self._settings.download_url:
            ticket = self._tickets.issue(device_id, content.digest, content.size, time.time())
            url = f"{self._settings.download_url}/api/v1/device-artifacts/{content.digest}"
            offer = SourceOffer(need.digest, url, ticket, LIFETIME_S)
        self._send(device_topic(device_id, DeviceTopic.SOURCE), encode(offer))

    def _renew(self, device_id: str, asked: Renew) -> None:
        """Its next certificate, or why it gets none."""
        with self._database.write() as session:
            identity = session.get(DeviceIdentity, device_id)
            if identity is None:
                log.warning("device %s asks for a new certificate, but never enrolled", device_id)
                return
            answer = self._renewed(session, device_id, asked)
            outbox.enqueue(
                session,
                fleet_id=identity.fleet_id,
                topic=device_topic(device_id, DeviceTopic.CERTIFICATE),
                payload=encode(answer),
                retain=False,
            )

    def _renewed(self, session: Session, device_id: str, asked: Renew) -> Certificate:
        try:
            row = enrolment.renew(session, self._authority, device_id, asked.csr, asked.signature)
        except FleetError as error:
            log.warning("device %s gets no new certificate: %s", device_id, error.detail)
            return Certificate(
                key_sha256=NO_KEY, failure=Failure(WireErrorCode.RENEWAL_REFUSED, error.detail[: LIMITS.detail_chars])
            )
        return Certificate(
            key_sha256=row.key_sha256,
            certificate=row.pem,
            ca=self._authority.ca.bundle,
            not_before=row.not_before.timestamp(),
            not_after=row.not_after.timestamp(),
        )

    def _trust_need(self, device_id: str, need: TrustNeed) -> None:
        """A device is sent its own fleet's metadata."""
        with self._database.read() as session:
            device = session.get(Device, device_id)
            if device is None:
                return
            body = trust.metadata_file(session, device.fleet_id, unquote(need.file))
        if body is None:
            piece = TrustPiece(need.file, need.offset, absent=True)
        else:
            data = body[need.offset : need.offset + LIMITS.trust_piece_bytes]
            piece = TrustPiece(need.file, min(need.offset, len(body)), len(body), data)
        self._send(device_topic(device_id, DeviceTopic.TRUST), encode(piece))

    def _command(self, device_id: str, answer: CommandAnswer) -> None:
        with self._database.write() as session:
            commands.take(session, device_id, answer, utc_now())

    def _samples(self, device_id: str, piece: SamplePiece) -> None:
        """What is lost of this is sent again, so it needs no row in the outbox."""
        ack = self._receiving.take(device_id, piece, utc_now())
        self._send(device_topic(device_id, DeviceTopic.SAMPLES_ACK), encode(ack))

    def _complain(self, topic: str, error: WireError) -> None:
        """Once a minute a topic: a device that is out of order must not fill the log."""
        now = time.monotonic()
        if now - self._complained.get(topic, -COMPLAIN_EVERY_S) >= COMPLAIN_EVERY_S:
            if len(self._complained) > 10_000:
                self._complained.clear()
            self._complained[topic] = now
            log.warning("refused a message on %s: %s", topic[:200], error, extra={"device": sender_of(topic)})


def is_telemetry(message: Message) -> bool:
    """Whether a message is, by its topic, a batch of telemetry."""
    return message.topic.endswith(_TELEMETRY)


def is_report(message: Message) -> bool:
    """Whether a message is, by its topic, a device's report: all of what the one before said, as it is now."""
    return message.topic.endswith(_REPORTED)


def _of(leaf: DeviceTopic) -> Callable[[Message], bool]:
    """Whether a message is, by its topic, of a kind."""
    end = f"/{leaf}"
    return lambda message: message.topic.endswith(end)
