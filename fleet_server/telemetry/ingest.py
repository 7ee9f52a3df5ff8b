"""From batches to rows: many in one transaction, each stored once whoever else stores it at the same time.

What makes a batch count once is that its name can be inserted once. Everything of a group is written in the transaction
that inserts the names, and a device is told to forget a batch only after that.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from agent.protocol.messages import ModelWindow, TelemetryBatch
from fleet_server.clock import utc_now
from fleet_server.db import UNAVAILABLE, Database
from fleet_server.models import HostWindowRow, ModelWindowRow
from fleet_server.telemetry import repository
from fleet_server.telemetry.bulk import BatchName, NamedBatch, insert_names, insert_rows
from fleet_server.telemetry.repository import SeriesKey
from fleet_server.telemetry.sequences import Sequences
from fleet_server.telemetry.signals import pack_signals
from fleet_server.telemetry.sketches import pack_cells, pack_latency

log = logging.getLogger(__name__)
LONGEST_WINDOW_S = 86_400.0
CLOCK_SLACK = dt.timedelta(minutes=5)
SERIES_KEPT = 100_000
WINDOW_COLUMNS = (
    *("group_id", "number", "series_id", "started_at", "ended_at", "requests", "errors", "rejected", "items"),
    *("latency", "confusion", "signals"),
)
HOST_VALUES = ("cpu_percent", "memory_used_mb", "agent_rss_mb", "temperature_c", "disk_free_mb")
HOST_COLUMNS = ("fleet_id", "device_id", "ended_at", *HOST_VALUES)


class Sent(NamedTuple):
    """A batch, and the device that sent it."""

    device_id: str
    batch: TelemetryBatch

    @property
    def name(self) -> BatchName:
        """What it is stored once by."""
        return BatchName(self.device_id, self.batch.spool_id, self.batch.sequence)


class Ingest:
    """Stores batches in groups, each in a transaction of its own; used by one thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._series: dict[SeriesKey, int] = {}

    def store(self, sent: Sequence[Sent]) -> list[Sent]:
        """Store batches; returns those that are in the database for good, now or since earlier.

        A group that the database refuses is halved, until the batch that it refuses is alone: that one is dropped.

        Raises:
            UNAVAILABLE: when the database does not work; nothing is known of the batches, they will come again.
        """
        if not sent:
            return []
        try:
            with self._database.write() as session:
                return store_group(session, sent, utc_now(), self._series)
        except UNAVAILABLE:
            self._series.clear()
            raise
        except Exception:
            self._series.clear()  # of what was rolled back nothing is known
            if len(sent) == 1:
                log.exception("dropped a telemetry batch of %s that can't be stored", sent[0].device_id)
                return []
        half = len(sent) // 2
        return self.store(sent[:half]) + self.store(sent[half:])


def store_group(
    session: Session, sent: Sequence[Sent], now: dt.datetime, known: dict[SeriesKey, int] | None = None
) -> list[Sent]:
    """Store those of some batches that are not stored yet, in the caller's transaction.

    Args:
        session: writes.
        sent: batches; the same one may be there twice.
        now: by the server's clock.
        known: ids of series that were looked up before, added to; to be emptied if the transaction fails.

    Returns:
        Those that the devices may forget: all but those of devices that are not known, or locked out.
    """
    fleets = repository.fleets_of_senders(session, {one.device_id for one in sent})
    accepted = [one for one in sent if one.device_id in fleets]
    by_name = {one.name: one for one in accepted}
    groups = {fleet_id: repository.add_group(session, fleet_id, now) for fleet_id in sorted(set(fleets.values()))}
    names = [NamedBatch(*name, fleets[name.device_id], groups[fleets[name.device_id]]) for name in by_name]
    new = insert_names(session, names) if names else set()
    new -= _stored_before(session, new)
    if new:
        _write(session, [by_name[name] for name in sorted(new)], fleets, groups, now, {} if known is None else known)
    used = {fleets[name.device_id] for name in new}
    repository.remove_groups(session, [groups[fleet_id] for fleet_id in groups if fleet_id not in used])
    repository.saw_devices(session, fleets, now)
    return accepted


def _stored_before(session: Session, inserted: set[BatchName]) -> set[BatchName]:
    """Those of the names just inserted that a spool's row has, which they are taken out of again.

    It is looked at after the names were inserted: whoever moves names there deletes them in the same transaction, and
    inserting one of these waited for its end.
    """
    spools = repository.stored_sequences(session, {(one.device_id, one.spool_id) for one in inserted})
    sets = {key: Sequences(packed) for key, packed in spools.items()}
    before = {one for one in inserted if (found := sets.get((one.device_id, one.spool_id))) and one.sequence in found}
    repository.remove_names(session, before)
    return before


def _write(
    session: Session,
    sent: Sequence[Sent],
    fleets: dict[str, str],
    groups: dict[str, int],
    now: dt.datetime,
    known: dict[SeriesKey, int],
) -> None:
    series = _series_of(session, sent, fleets, known)
    windows: list[tuple[Any, ...]] = []
    hosts: list[tuple[Any, ...]] = []
    for one in sent:
        fleet_id = fleets[one.device_id]
        group, (started, ended) = groups[fleet_id], _window(one.batch, now)
        for model in one.batch.models:
            numbers = (model.requests, model.errors, model.rejected, model.items)
            signals = pack_signals(model, one.batch.host)
            sketches = (pack_latency(model.latency), pack_cells(model.confusion), signals)
            of = series[_key(one.device_id, model)]
            windows.append((group, len(windows), of, started, ended, *numbers, *sketches))
        host = one.batch.host
        hosts.append((fleet_id, one.device_id, ended, *(getattr(host, name) for name in HOST_VALUES)))
    insert_rows(session, ModelWindowRow, WINDOW_COLUMNS, windows)
    insert_rows(session, HostWindowRow, HOST_COLUMNS, hosts)


def _key(device_id: str, model: ModelWindow) -> SeriesKey:
    return SeriesKey(device_id, model.deployment_id, model.model, model.version, model.digest, model.provider)


def _series_of(
    session: Session, sent: Iterable[Sent], fleets: dict[str, str], known: dict[SeriesKey, int]
) -> dict[SeriesKey, int]:
    wanted = {_key(one.device_id, model) for one in sent for model in one.batch.models}
    unknown = sorted(key for key in wanted if key not in known)
    if unknown:
        if len(known) + len(unknown) > SERIES_KEPT:
            known.clear()
            unknown = sorted(wanted)
        known.update(repository.series_ids(session, unknown, fleets))
    return known


def _window(batch: TelemetryBatch, now: dt.datetime) -> tuple[dt.datetime, dt.datetime]:
    """The window's times; those of a clock that is ahead of ours, or impossible, are moved to end now."""
    length = batch.ended_at - batch.started_at
    length = min(max(length, 0.0), LONGEST_WINDOW_S) if math.isfinite(length) else 0.0
    try:
        ended = dt.datetime.fromtimestamp(batch.ended_at, dt.UTC)
    except (ValueError, OverflowError, OSError):
        ended = now
    if ended > now + CLOCK_SLACK or ended.year < 2020:
        ended = now
    return ended - dt.timedelta(seconds=length), ended
