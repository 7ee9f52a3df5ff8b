"""Looks at one rule's subjects, and writes what moved: whole, with what routes are to hear of it, or not at all.

What is looked at is read first, without keeping anybody from writing; that may take a while. If the rule was changed
meanwhile, nothing is written, and the next look is at the rule as it is then.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from fleet_server.alerts import repository
from fleet_server.alerts.drift import Drift, keep_figures, keep_references
from fleet_server.alerts.readings import find
from fleet_server.alerts.repository import OpenAlert
from fleet_server.alerts.schemas import RouteSpec, RuleSpec
from fleet_server.alerts.scope import Scope
from fleet_server.alerts.subjects import Found, Subject
from fleet_server.db import Database, new_id
from fleet_server.domain.alerting import KINDS, UNKNOWN_S, AlertState, Move, Patience, Reading, look
from fleet_server.errors import InvalidError
from fleet_server.models import AlertRoute, AlertRule
from fleet_server.settings import Settings

TICK = dt.timedelta(milliseconds=1)


@dataclass(frozen=True)
class _Look:
    """What a look at a rule came to."""

    spec: RuleSpec
    at: dt.datetime
    seen: object
    known: Mapping[str, OpenAlert]
    subjects: Mapping[str, Subject]
    found: Drift
    moves: Sequence[Move]
    problem: str
    unheard: bool

    @property
    def matters(self) -> bool:
        return bool(self.moves or self.found.references or self.found.figures or self.unheard)


def evaluate(database: Database, settings: Settings, rule_id: str, now: dt.datetime) -> bool:
    """Look at a rule and write what moved; whether anything was written."""
    with database.read() as session:
        rule = session.get(AlertRule, rule_id)
        if rule is None:
            return False
        looked = _look(session, settings, rule, now)
        if not looked.matters and looked.problem == rule.problem:
            return False
    with database.write() as session:
        if repository.hold_fleet(session, rule.fleet_id) is None:
            return False
        held = session.get(AlertRule, rule_id, with_for_update=True)
        if held is None or _version(held) != looked.seen:
            return False
        _write(session, held, looked)
    return True


def _version(rule: AlertRule) -> object:
    return rule.clock_at, rule.spec


def _look(session: Session, settings: Settings, rule: AlertRule, now: dt.datetime) -> _Look:
    spec = RuleSpec.model_validate(rule.spec)
    at = max(now, rule.clock_at + TICK)
    known = {one.subject.text: one for one in repository.open_alerts(session, rule.id)}
    found, problem = Drift(), ""
    if spec.enabled:
        try:
            found = find(Scope(session, rule.fleet_id, spec, settings.telemetry_interval_s, at))
        except InvalidError as error:
            problem = error.detail
    subjects = {subject.text: subject for subject in found.findings}
    bounds = spec.bounds
    readings = {
        subject.text: Reading.HOLDS if bounds is None else bounds.read(one.value)
        for subject, one in found.findings.items()
    }
    unknown = spec.enabled and (KINDS[spec.metric].known or bool(problem))
    moves = look(
        {text: one.standing for text, one in known.items()},
        readings,
        spec.patience if spec.enabled else Patience(),
        at,
        others=Reading.UNKNOWN if unknown else Reading.CLEAR,
    )
    unheard = repository.has_unheard(session, rule, at)
    return _Look(spec, at, _version(rule), known, subjects, found, moves, problem, unheard)


def _write(session: Session, rule: AlertRule, looked: _Look) -> None:
    rule.problem = looked.problem[:1000]
    if not looked.matters:
        return
    keep_references(session, looked.found.references, looked.at)
    since = looked.at - dt.timedelta(seconds=looked.spec.seconds)
    keep_figures(session, rule.fleet_id, looked.found.figures, (since, looked.at))
    new, changed, gone, heard_over = [], [], [], False
    for move in looked.moves:
        known = looked.known.get(move.subject)
        if known is None:
            new.append(_new(rule, looked, move))
        elif move.after is None:
            gone.append(known.id)
        else:
            changed.append(_changed(known.id, looked, move))
            heard_over |= known.heard and move.after.state is AlertState.RESOLVED
    repository.remove_alerts(session, gone)
    repository.add_alerts(session, new)
    for columns in {frozenset(one) for one in changed}:
        repository.change_alerts(session, [one for one in changed if one.keys() == columns])
    moved = bool(new or changed or gone)
    heard = repository.hear(session, rule, looked.at)
    if heard or heard_over:
        told = [one.id for one in repository.rows_of(session, AlertRoute, rule.fleet_id) if _wants(one, rule, looked)]
        repository.note_news(session, rule.id, told, looked.at)
    if moved or heard:
        rule.clock_at = looked.at


def _wants(route: AlertRoute, rule: AlertRule, looked: _Look) -> bool:
    return RouteSpec.model_validate(route.spec).wants(rule.name, looked.spec.severity)


def _new(rule: AlertRule, looked: _Look, move: Move) -> dict[str, object]:
    assert move.after is not None
    subject = looked.subjects[move.subject]
    found = looked.found.findings[subject]
    return {
        "id": new_id(),
        "fleet_id": rule.fleet_id,
        "rule_id": rule.id,
        "rule": rule.name,
        "metric": looked.spec.metric.value,
        "severity": looked.spec.severity.value,
        "subject": move.subject,
        "device_id": subject.device_id,
        "model": subject.model,
        "rollout_id": subject.rollout_id,
        "state": move.after.state.value,
        "value": found.value,
        "detail": describe(looked.spec, found),
        "since": move.after.since,
        "firing_at": looked.at if move.after.state is AlertState.FIRING else None,
    }


def _changed(alert_id: str, looked: _Look, move: Move) -> dict[str, object]:
    """The columns that change; those of a kind of move are the same."""
    assert move.before is not None
    assert move.after is not None
    row: dict[str, object] = {"id": alert_id, "clearing_since": move.after.clearing_since}
    if move.after.state is AlertState.RESOLVED:
        resolution = _resolution(looked, move.subject)
        return row | {"state": move.after.state.value, "resolved_at": looked.at, "resolution": resolution}
    if move.before.state is AlertState.PENDING:
        found = looked.found.findings[looked.subjects[move.subject]]
        said = {"value": found.value, "detail": describe(looked.spec, found)}
        return row | {"state": move.after.state.value, "firing_at": looked.at, **said}
    return row


def _resolution(looked: _Look, subject: str) -> str:
    if not looked.spec.enabled:
        return "its rule was disabled"
    if subject not in looked.subjects and KINDS[looked.spec.metric].known:
        return f"nothing was heard of it for {UNKNOWN_S / 60:.0f} minutes"
    return "it holds no more"


def describe(spec: RuleSpec, found: Found) -> str:
    """What was found, in a line."""
    kind = KINDS[spec.metric]
    value = "" if not kind.unit else f": {found.value:.4g} {kind.unit}"
    bound = "" if spec.threshold is None else f", {'below' if spec.low else 'above'} {spec.threshold:g}"
    return f"{kind.said}{value}{bound}" + (f" ({found.detail})" if found.detail else "")
