"""Every query over alert rules, alerts, routes, silences and e-mails, but those that look at the fleet (`readings`)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, and_, delete, false, func, insert, or_, select, true, update
from sqlalchemy.orm import Session

from fleet_server.alerts.subjects import Subject
from fleet_server.db import pieces, question
from fleet_server.devices.selection import condition, read_query
from fleet_server.domain.alerting import AlertState, Standing
from fleet_server.models import Alert, AlertGroup, AlertMail, AlertRoute, AlertRule, AlertSilence, Device, Fleet
from fleet_server.paging import PageRequest, Rows, TableList, matches

PENDING, FIRING, RESOLVED = (one.value for one in AlertState)
OPEN = (PENDING, FIRING)
HAS_MAILS = question(select(AlertMail.id).where(AlertMail.state == "pending"))
RULES = TableList(
    AlertRule.id, {"name": AlertRule.name, "created_at": AlertRule.id}, default="name", name=AlertRule.name,
    time=AlertRule.created_at,
)  # fmt: skip
ALERTS = TableList(
    Alert.id, {"since": Alert.id, "subject": Alert.subject, "rule": Alert.rule}, default="-since", time=Alert.since,
    times="",
)  # fmt: skip
ROUTES = TableList(
    AlertRoute.id, {"name": AlertRoute.name, "created_at": AlertRoute.id}, default="name", name=AlertRoute.name,
    time=AlertRoute.created_at,
)  # fmt: skip
SILENCES = TableList(
    AlertSilence.id,
    {"created_at": AlertSilence.id, "ends_at": AlertSilence.ends_at},
    default="-created_at",
    time=AlertSilence.created_at,
)
RowT = TypeVar("RowT", AlertRule, AlertRoute)


class OpenAlert(NamedTuple):
    """An alert that is pending or fires, and whether routes may have heard of it."""

    id: str
    subject: Subject
    standing: Standing
    heard: bool


def hold_fleet(session: Session, fleet_id: str) -> Fleet | None:
    """A fleet that stays while the transaction goes on."""
    return session.get(Fleet, fleet_id, with_for_update={"read": True, "key_share": True})


# -- rules and routes


def named(session: Session, table: type[RowT], fleet_id: str, name: str) -> RowT | None:
    """A rule or a route of a fleet."""
    return session.scalar(select(table).where(table.fleet_id == fleet_id, table.name == name))


def rules_page(session: Session, fleet_id: str, request: PageRequest, *, shipped: bool | None) -> Rows[AlertRule]:
    """A page of rules."""
    query = select(AlertRule).where(AlertRule.fleet_id == fleet_id)
    return RULES.scalars(session, query if shipped is None else query.where(AlertRule.shipped.is_(shipped)), request)


def routes_page(session: Session, fleet_id: str, request: PageRequest) -> Rows[AlertRoute]:
    """A page of routes."""
    return ROUTES.scalars(session, select(AlertRoute).where(AlertRoute.fleet_id == fleet_id), request)


def rows_of(session: Session, table: type[RowT], fleet_id: str | None = None) -> Sequence[RowT]:
    """Every rule or route, of a fleet or of all."""
    query = select(table).order_by(table.id)
    return session.scalars(query if fleet_id is None else query.where(table.fleet_id == fleet_id)).all()


def count(session: Session, table: type[RowT], fleet_id: str) -> int:
    """How many rules or routes a fleet has."""
    return session.scalar(select(func.count()).select_from(table).where(table.fleet_id == fleet_id)) or 0


def fleets_without_defaults(session: Session, shipped: int) -> Sequence[str]:
    """Fleets that did not get all that is shipped."""
    return session.scalars(select(Fleet.id).where(Fleet.alert_defaults < shipped).order_by(Fleet.id)).all()


# -- alerts


def alert(session: Session, fleet_id: str, alert_id: str) -> Alert | None:
    """One alert of a fleet."""
    found = session.get(Alert, alert_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def alerts_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    equal: Iterable[tuple[Any, object]],
    subject: str | None,
    acknowledged: bool | None,
    silenced: bool | None,
    now: dt.datetime,
) -> Rows[tuple[Alert, bool]]:
    """A page of alerts, with whether each is silenced; of `equal` every column that has a value must have it."""
    quiet = silenced_now(session, fleet_id, now)
    query = select(Alert, quiet.label("silenced")).where(Alert.fleet_id == fleet_id)
    for column, value in equal:
        if value is not None:
            query = query.where(column == value)
    if subject is not None:
        query = query.where(matches(Alert.subject, subject))
    if acknowledged is not None:
        query = query.where(Alert.acknowledged_at.is_not(None) if acknowledged else Alert.acknowledged_at.is_(None))
    if silenced is not None:
        query = query.where(quiet if silenced else ~quiet)
    return ALERTS.rows(session, query, request)


def is_silenced(session: Session, found: Alert, now: dt.datetime) -> bool:
    """Whether a silence matches an alert."""
    return bool(session.scalar(select(silenced_now(session, found.fleet_id, now)).where(Alert.id == found.id)))


def counts(session: Session, fleet_id: str, now: dt.datetime) -> Sequence[tuple[str, str, bool, bool, int]]:
    """Open alerts: state, severity, whether acknowledged, whether silenced, and how many are so."""
    quiet = silenced_now(session, fleet_id, now).label("silenced")
    columns = (Alert.state, Alert.severity, Alert.acknowledged_at.is_not(None).label("acknowledged"), quiet)
    found = select(*columns).where(Alert.fleet_id == fleet_id, Alert.state.in_(OPEN)).subquery()
    query = select(*found.c, func.count()).group_by(*found.c)
    return [(row[0], row[1], bool(row[2]), bool(row[3]), row[4]) for row in session.execute(query)]


def open_alerts(session: Session, rule_id: str) -> list[OpenAlert]:
    """Alerts of a rule that are pending or fire."""
    row = Alert
    columns = (row.id, row.device_id, row.model, row.rollout_id, row.state, row.since, row.clearing_since, row.heard_at)
    query = select(*columns).where(row.rule_id == rule_id, row.state.in_(OPEN))
    return [
        OpenAlert(one.id, Subject(one.device_id, one.model, one.rollout_id),
                  Standing(AlertState(one.state), one.since, one.clearing_since), one.heard_at is not None)
        for one in session.execute(query)
    ]  # fmt: skip


def add_alerts(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Add alerts, all with the same columns."""
    if rows:
        session.execute(insert(Alert), list(rows))


def change_alerts(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Change alerts by their `id`, all in the same columns."""
    if rows:
        session.execute(update(Alert), list(rows))


def remove_alerts(session: Session, ids: Sequence[str]) -> None:
    """Remove alerts that came to nothing."""
    for piece in pieces(ids):
        session.execute(delete(Alert).where(Alert.id.in_(piece)).execution_options(synchronize_session=False))


def close_alerts(session: Session, rule_id: str, now: dt.datetime, why: str) -> None:
    """End all alerts of a rule that are open: those that are pending go."""
    of_rule = Alert.rule_id == rule_id
    session.execute(delete(Alert).where(of_rule, Alert.state == PENDING).execution_options(synchronize_session=False))
    over = {"state": RESOLVED, "resolved_at": now, "resolution": why}
    session.execute(
        update(Alert).where(of_rule, Alert.state == FIRING).values(**over).execution_options(synchronize_session=False)
    )


def forget_alerts(session: Session, before: dt.datetime) -> None:
    """Remove what resolved before a time, and silences and e-mails that were over then."""
    old = (
        delete(Alert).where(Alert.state == RESOLVED, Alert.resolved_at < before),
        delete(AlertSilence).where(AlertSilence.ends_at < before),
        delete(AlertMail).where(AlertMail.finished_at < before),
    )
    for statement in old:
        session.execute(statement.execution_options(synchronize_session=False))


def firing(session: Session, rule_id: str) -> int:
    """How many alerts of a rule fire."""
    return _number(session, Alert.rule_id == rule_id, Alert.state == FIRING)


def _number(session: Session, *where: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(Alert).where(*where)) or 0


# -- silences


def silence(session: Session, fleet_id: str, silence_id: str) -> AlertSilence | None:
    """One silence of a fleet."""
    found = session.get(AlertSilence, silence_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def silences_page(
    session: Session, fleet_id: str, request: PageRequest, *, active: bool | None, now: dt.datetime
) -> Rows[AlertSilence]:
    """A page of silences."""
    query = select(AlertSilence).where(AlertSilence.fleet_id == fleet_id)
    if active is not None:
        holds = and_(AlertSilence.starts_at <= now, AlertSilence.ends_at > now)
        query = query.where(holds if active else ~holds)
    return SILENCES.scalars(session, query, request)


def silenced_now(session: Session, fleet_id: str, now: dt.datetime) -> ColumnElement[bool]:
    """What holds of an alert of a fleet that nobody is to be told of."""
    row = AlertSilence
    query = select(row).where(row.fleet_id == fleet_id, row.ends_at > now, row.starts_at <= now)
    return or_(false(), *(_matched(one) for one in session.scalars(query)))


def _matched(one: AlertSilence) -> ColumnElement[bool]:
    parts: list[ColumnElement[bool]] = [true()]
    if one.rule is not None:
        parts.append(matches(Alert.rule, one.rule))
    if one.subject is not None:
        parts.append(matches(Alert.subject, one.subject))
    if one.query is not None:
        devices = select(Device.id).where(
            Device.fleet_id == one.fleet_id, condition(read_query(one.query, "query"), one.fleet_id)
        )
        parts.append(and_(Alert.device_id.is_not(None), Alert.device_id.in_(devices)))
    return and_(*parts)


def _unheard(session: Session, rule: AlertRule, now: dt.datetime) -> list[ColumnElement[bool]]:
    quiet = silenced_now(session, rule.fleet_id, now)
    return [Alert.rule_id == rule.id, Alert.state == FIRING, Alert.heard_at.is_(None), ~quiet]


def hear(session: Session, rule: AlertRule, now: dt.datetime) -> bool:
    """Let routes be told of what fires and is silenced no more; whether there is any."""
    ids = session.scalars(select(Alert.id).where(*_unheard(session, rule, now))).all()
    change_alerts(session, [{"id": one, "heard_at": now} for one in ids])
    return bool(ids)


def has_unheard(session: Session, rule: AlertRule, now: dt.datetime) -> bool:
    """Whether something of a rule fires that was silenced when it was last looked at, and is no more."""
    return session.scalar(select(Alert.id).where(*_unheard(session, rule, now)).limit(1)) is not None


# -- what routes are told


def groups(session: Session) -> Sequence[tuple[AlertGroup, AlertRoute, AlertRule]]:
    """What every route was told of every rule that there was something to tell of."""
    query = (
        select(AlertGroup, AlertRoute, AlertRule)
        .join(AlertRoute, AlertRoute.id == AlertGroup.route_id)
        .join(AlertRule, AlertRule.id == AlertGroup.rule_id)
        .order_by(AlertGroup.rule_id, AlertGroup.route_id)
    )
    return [(row[0], row[1], row[2]) for row in session.execute(query)]


def note_news(session: Session, rule_id: str, route_ids: Iterable[str], now: dt.datetime) -> None:
    """There is something to tell routes of a rule."""
    for route_id in route_ids:
        group = session.get(AlertGroup, (rule_id, route_id))
        if group is None:
            session.add(AlertGroup(rule_id=rule_id, route_id=route_id, news_since=now))
        elif group.news_since is None:
            group.news_since = now
    session.flush()


class Selected(NamedTuple):
    """Alerts of a rule: how many, and the first of them."""

    total: int
    first: Sequence[Alert]


def _selected(session: Session, limit: int, *where: ColumnElement[bool]) -> Selected:
    first = session.scalars(select(Alert).where(*where).order_by(Alert.id).limit(limit)).all()
    return Selected(len(first) if len(first) < limit else _number(session, *where), first)


def loud(session: Session, rule: AlertRule, now: dt.datetime) -> list[ColumnElement[bool]]:
    """What must hold of an alert of a rule that fires and that routes may be told of."""
    quiet = silenced_now(session, rule.fleet_id, now)
    return [Alert.rule_id == rule.id, Alert.state == FIRING, Alert.heard_at.is_not(None), ~quiet]


def news(
    session: Session,
    rule: AlertRule,
    since: dt.datetime | None,
    resolved_since: dt.datetime,
    now: dt.datetime,
    limit: int,
) -> tuple[Selected, Selected]:
    """What fires that a route has not heard of, and what resolved of what it might have.

    Args:
        session: to read with.
        rule: of which.
        since: when the route was told last; None when never.
        resolved_since: what resolved after it counts.
        now: for silences.
        limit: of the alerts that are listed.
    """
    new = loud(session, rule, now)
    if since is not None:
        new.append(Alert.heard_at > since)
    over = (Alert.rule_id == rule.id, Alert.resolved_at > resolved_since, Alert.heard_at.is_not(None))
    return _selected(session, limit, *new), _selected(session, limit, *over)


def loud_count(session: Session, rule: AlertRule, now: dt.datetime) -> int:
    """How many alerts of a rule fire that are not silenced."""
    return _number(session, *loud(session, rule, now))


def unattended(session: Session, rule: AlertRule, now: dt.datetime, limit: int) -> Selected:
    """What fires that nobody acknowledged or silenced."""
    return _selected(session, limit, *loud(session, rule, now), Alert.acknowledged_at.is_(None))


# -- e-mails


def mails_due(session: Session, now: dt.datetime, limit: int) -> Sequence[AlertMail]:
    """What is to be sent now, the oldest first."""
    query = select(AlertMail).where(AlertMail.state == "pending", AlertMail.next_at <= now)
    return session.scalars(query.order_by(AlertMail.id).limit(limit)).all()


def mail_counts(session: Session, route_id: str) -> tuple[int, int, str]:
    """How many e-mails of a route wait, how many were given up, and what was said last to one that was not taken."""
    row = AlertMail
    query = select(row.state, func.count()).where(row.route_id == route_id).group_by(row.state)
    found: dict[str, int] = {row[0]: row[1] for row in session.execute(query)}
    last = select(row.last_detail).where(row.route_id == route_id, row.last_detail != "", row.state != "sent")
    return found.get("pending", 0), found.get("dead", 0), session.scalar(last.order_by(row.id.desc()).limit(1)) or ""
