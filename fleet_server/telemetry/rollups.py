"""Windows into hours, hours into days, and what is too old out: each function is one small step of a transaction.

What a step does is all in the transaction that says that it is done, so it may be killed anywhere and begun again. Two
servers that do the same at once wait for each other at the rows that they lock, or one of them fails and tries again.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy.orm import Session

from fleet_server.models import TelemetryFleetTotal
from fleet_server.telemetry import keeping, repository
from fleet_server.telemetry.keeping import Period
from fleet_server.telemetry.sequences import Sequences
from fleet_server.telemetry.totals import DAY_S, FLEET_S, HOUR_S, FleetTotal, Part, Total, period_of

WINDOWS = 4000  # of one step
ROLLUPS = 2000


def roll_up_windows(session: Session, before: dt.datetime) -> int:
    """Add the windows of the oldest groups that are not in hours yet to these; how many groups it were.

    The names of their batches go into the rows of their spools, where they need less room.
    """
    groups = keeping.open_groups(session, before, windows=WINDOWS)
    if not groups:
        return 0
    _keep_names(session, groups)
    for fleet_id, of_fleet in keeping.by_fleet(session, groups).items():
        windows = list(keeping.windows_of(session, of_fleet))
        _add(session, ((Period(one.series_id, HOUR_S, period_of(one.ended_at, HOUR_S)), one) for one in windows))
        _add_to_fleet(session, fleet_id, windows)
    keeping.mark_rolled_up(session, groups)
    return len(groups)


def roll_up_hours(session: Session, before: dt.datetime) -> int:
    """Add hours that were over before a time to their days, in whose place they are then; how many it were."""
    hours = keeping.rollups_before(session, HOUR_S, before, limit=ROLLUPS)
    _add(session, ((Period(key.series_id, DAY_S, period_of(key.period_at, DAY_S)), part) for key, part in hours))
    keeping.remove_rollups(session, [key for key, _ in hours])
    return len(hours)


def forget_days(session: Session, before: dt.datetime) -> int:
    """Remove days that were over before a time; how many it were."""
    days = [key for key, _ in keeping.rollups_before(session, DAY_S, before, limit=ROLLUPS)]
    keeping.remove_rollups(session, days)
    return len(days)


def forget_windows(session: Session, before: dt.datetime) -> int:
    """Remove windows of groups that were stored before a time, and are in roll-ups; how many groups it were."""
    return keeping.empty_groups(session, before, windows=WINDOWS)


def forget_hosts(session: Session, before: dt.datetime) -> int:
    """Remove host windows that ended before a time; how many it were."""
    return keeping.remove_hosts(session, before, limit=WINDOWS)


def forget_fleet_totals(session: Session, before: dt.datetime, *, step_s: int) -> int:
    """Remove sums of fleets of periods of a length that began before a time; nothing is left to do then."""
    keeping.remove_fleet_totals(session, step_s, before)
    return 0


def _keep_names(session: Session, groups: list[int]) -> None:
    by_spool: dict[tuple[str, str], list[int]] = defaultdict(list)
    fleets: dict[tuple[str, str], str] = {}
    for name, fleet_id in keeping.take_names(session, groups):
        by_spool[name.device_id, name.spool_id].append(name.sequence)
        fleets[name.device_id, name.spool_id] = fleet_id
    stored = repository.stored_sequences(session, by_spool, lock=True)
    rows = []
    for (device_id, spool_id), numbers in sorted(by_spool.items()):
        found = Sequences(stored.get((device_id, spool_id), b""))
        found.add(numbers)
        rows.append((device_id, spool_id, fleets[device_id, spool_id], found.packed()))
    keeping.keep_spools(session, rows, stored)


def _add_to_fleet(session: Session, fleet_id: str, windows: Sequence[Part]) -> None:
    """Add windows to what all of their fleet did: in five minutes, for the last hour of it, and in hours."""
    fine: dict[dt.datetime, FleetTotal] = defaultdict(FleetTotal)
    for one in windows:
        fine[period_of(one.ended_at, FLEET_S)].add(one.requests, one.errors, one.latency)
    hours: dict[dt.datetime, FleetTotal] = defaultdict(FleetTotal)
    for period_at, total in fine.items():
        hours[period_of(period_at, HOUR_S)].merge(total)
    for step_s, totals in ((FLEET_S, fine), (HOUR_S, hours)):
        known = keeping.fleet_totals_of(session, fleet_id, step_s, sorted(totals))
        for period_at, total in totals.items():
            row = known.get(period_at)
            if row is None:
                row = TelemetryFleetTotal(fleet_id=fleet_id, step_s=step_s, period_at=period_at)
                session.add(row)
            else:
                total.add(row.requests, row.errors, row.latency)
            row.requests, row.errors, row.latency = total.values()
    session.flush()


def _add(session: Session, parts: Iterable[tuple[Period, Part]]) -> None:
    by_period: dict[Period, list[Part]] = defaultdict(list)
    for period, part in parts:
        by_period[period].append(part)
    known = keeping.rollups_of(session, sorted(by_period))
    for period, part in known:
        by_period[period].append(part)
    totals = {period: Total.of(found) for period, found in sorted(by_period.items())}
    rows = [(period, total.values()) for period, total in totals.items() if total]
    keeping.keep_rollups(session, rows, {period for period, _ in known})
