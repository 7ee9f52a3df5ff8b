"""Tells routes what is due: a notice is written in the transaction that notes that it was told; others send it."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

from sqlalchemy.orm import Session

from agent.protocol.topics import alerts_topic
from fleet_server import events, outbox
from fleet_server.alerts import repository
from fleet_server.alerts.evaluation import TICK
from fleet_server.alerts.notices import LISTED, Notice, listed
from fleet_server.alerts.repository import Selected
from fleet_server.alerts.schemas import RouteKind, RouteSpec, RuleSpec
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.domain.notifying import Told, due, repeats
from fleet_server.models import AlertGroup, AlertMail, AlertRoute, AlertRule


def tell_due(database: Database, now: dt.datetime) -> int:
    """Tell every route what is due; how many were told something."""
    with database.read() as session:
        found = [
            (group.rule_id, group.route_id)
            for group, route, rule in repository.groups(session)
            if _is_due(session, group, route, rule, now)
        ]
    told = 0
    for rule_id, route_id in found:
        with database.write() as session:
            told += _tell(session, rule_id, route_id, now)
    return told


def _is_due(session: Session, group: AlertGroup, route: AlertRoute, rule: AlertRule, now: dt.datetime) -> bool:
    spec, at = RouteSpec.model_validate(route.spec), max(now, rule.clock_at)
    if not spec.wants(rule.name, RuleSpec.model_validate(rule.spec).severity):
        return False
    told = Told(group.told_at, group.news_since)
    if due(told, spec.timing, at):
        return True
    return repeats(told, spec.timing, at) and repository.unattended(session, rule, at, 1).total > 0


def _tell(session: Session, rule_id: str, route_id: str, now: dt.datetime) -> bool:
    route = session.get(AlertRoute, route_id)
    if route is None or repository.hold_fleet(session, route.fleet_id) is None:
        return False
    rule = session.get(AlertRule, rule_id, with_for_update=True)
    group = session.get(AlertGroup, (rule_id, route_id), with_for_update=True)
    if rule is None or group is None or not _is_due(session, group, route, rule, now):
        return False
    at = max(now, rule.clock_at)
    for notice in _notices(session, group, route, rule, at):
        put(session, route, notice)
    group.told_at, group.news_since, rule.clock_at = at, None, at
    return True


def _notices(session: Session, group: AlertGroup, route: AlertRoute, rule: AlertRule, at: dt.datetime) -> list[Notice]:
    spec = RuleSpec.model_validate(rule.spec)
    blank = Notice(
        rule.fleet_id, "firing", rule.name, spec.severity.value, spec.metric.value, spec.description,
        firing=repository.loud_count(session, rule, at),
    )  # fmt: skip
    if group.news_since is None:
        return [_about(replace(blank, repeated=True), repository.unattended(session, rule, at, LISTED))]
    since = group.told_at or max(route.created_at, rule.created_at)
    new, over = repository.news(session, rule, group.told_at, since, at, LISTED)
    found = [(blank, new), (replace(blank, state="resolved"), over)]
    return [_about(notice, selected) for notice, selected in found if selected.total]


def _about(notice: Notice, selected: Selected) -> Notice:
    return replace(notice, count=selected.total, alerts=listed(selected.first))


def close(session: Session, rule: AlertRule, why: str, *, deleted: bool = False) -> None:
    """End all alerts of a rule that are open, and tell who may have heard of them: at once where it is to go."""
    at = max(utc_now(), rule.clock_at + TICK)
    repository.close_alerts(session, rule.id, at, why)
    session.flush()
    over = repository.news(session, rule, at, rule.clock_at, at, LISTED)[1]
    rule.clock_at = at
    if not over.total:
        return
    spec = RuleSpec.model_validate(rule.spec)
    routes = repository.rows_of(session, AlertRoute, rule.fleet_id)
    wanting = [one for one in routes if RouteSpec.model_validate(one.spec).wants(rule.name, spec.severity)]
    if not deleted:
        repository.note_news(session, rule.id, [one.id for one in wanting], at)
        return
    notice = Notice(rule.fleet_id, "resolved", rule.name, spec.severity.value, spec.metric.value, spec.description)
    for route in wanting:
        put(session, route, _about(notice, over))


def put(session: Session, route: AlertRoute, notice: Notice) -> None:
    """Write what a route is to be told; who sends it looks for it."""
    spec = RouteSpec.model_validate(route.spec)
    match spec.kind:
        case RouteKind.WEBHOOK:
            kind, subject = f"shoal.alert.{notice.state}", f"alert-rule/{notice.rule or 'none'}"
            events.emit(session, fleet_id=route.fleet_id, kind=kind, subject=subject, data=lambda: notice.data)
        case RouteKind.MQTT:
            topic = alerts_topic(route.fleet_id)
            outbox.enqueue(session, fleet_id=route.fleet_id, topic=topic, payload=notice.message, retain=False)
        case RouteKind.EMAIL:
            mail = AlertMail(
                fleet_id=route.fleet_id,
                route_id=route.id,
                recipients=list(spec.to),
                subject=notice.title,
                body=notice.text,
            )
            session.add(mail)
