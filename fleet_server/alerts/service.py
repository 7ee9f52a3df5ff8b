"""Rules of alert rules, routes, silences and acknowledgements. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.alerts import repository
from fleet_server.alerts.notices import Notice
from fleet_server.alerts.schemas import (
    AlertCount,
    AlertCounts,
    AlertView,
    RouteCreate,
    RouteKind,
    RouteSpec,
    RouteTest,
    RouteUpdate,
    RouteView,
    RuleCreate,
    RuleSpec,
    RuleUpdate,
    RuleView,
    SilenceCreate,
    SilenceView,
)
from fleet_server.alerts.telling import close, put
from fleet_server.clock import utc_now
from fleet_server.devices.service import query_condition
from fleet_server.domain.alerting import KINDS, AlertState
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Alert, AlertRoute, AlertRule, AlertSilence
from fleet_server.paging import in_utc
from fleet_server.principals import Who
from fleet_server.settings import Settings

SpecT = TypeVar("SpecT", RuleSpec, RouteSpec)
MOST_RULES = 200  # of a fleet: each is a query over it, again and again
MOST_ROUTES = 50
LONGEST_SILENCE = dt.timedelta(days=366)
RESELECTS = ("query", "model", "low", "seconds")  # changed, other subjects may be meant: what was open is over


# -- rules


def create_rule(session: Session, fleet_id: str, wanted: RuleCreate, *, actor: Who) -> AlertRule:
    """Add a rule.

    Raises:
        ConflictError: when the fleet has one of that name.
        InvalidError: for a query that can't be read, and where the fleet has too many rules.
    """
    if repository.named(session, AlertRule, fleet_id, wanted.name) is not None:
        raise ConflictError("alert_rule_exists", f"there is an alert rule {wanted.name!r} already: change or delete it")
    if repository.count(session, AlertRule, fleet_id) >= MOST_RULES:
        raise InvalidError("too_many_alert_rules", f"the fleet has {MOST_RULES} alert rules: delete one first")
    _check_query(session, fleet_id, wanted.query)
    spec = wanted.model_dump(mode="json", exclude={"name"})
    rule = AlertRule(fleet_id=fleet_id, name=wanted.name, spec=spec, created_by=str(actor))
    session.add(rule)
    session.flush()
    _record(session, rule, actor, "alert_rule.create", f"alert-rule/{rule.name}", after=spec)
    return rule


def get_rule(session: Session, fleet_id: str, name: str) -> AlertRule:
    """One rule.

    Raises:
        NotFoundError: when the fleet has none of that name.
    """
    rule = repository.named(session, AlertRule, fleet_id, name)
    if rule is None:
        raise NotFoundError("alert_rule", name, remedy="list them with `shoal alert rule ls`")
    return rule


def change_rule(session: Session, rule: AlertRule, change: RuleUpdate, *, actor: Who) -> AlertRule:
    """Change a rule. Where other subjects may be meant then, its open alerts are over; what holds still comes again.

    Raises:
        InvalidError: naming the field, where what comes of it is no rule.
    """
    before = dict(rule.spec)
    given = change.model_dump(mode="json", exclude_unset=True)
    spec = _checked(RuleSpec, {**before, **given})
    if "query" in given:
        _check_query(session, rule.fleet_id, spec.query)
    rule.spec = spec.model_dump(mode="json")
    old = RuleSpec.model_validate(before)
    if any(getattr(spec, name) != getattr(old, name) for name in RESELECTS):
        close(session, rule, "its rule was changed")
    elif spec.severity is not old.severity:
        open_ones = repository.open_alerts(session, rule.id)
        repository.change_alerts(session, [{"id": one.id, "severity": spec.severity.value} for one in open_ones])
    session.flush()
    _record(session, rule, actor, "alert_rule.update", f"alert-rule/{rule.name}", before=before, after=rule.spec)
    return rule


def delete_rule(session: Session, rule: AlertRule, *, actor: Who) -> None:
    """Look no more; its open alerts are over, and what came of it stays."""
    close(session, rule, "its rule was deleted", deleted=True)
    _record(session, rule, actor, "alert_rule.delete", f"alert-rule/{rule.name}", before=rule.spec)
    session.delete(rule)
    session.flush()


def rule_view(rule: AlertRule, firing: int | None = None) -> RuleView:
    """The HTTP shape of a rule."""
    spec = RuleSpec.model_validate(rule.spec)
    fields = spec.model_dump() | {
        "id": rule.id, "name": rule.name, "unit": KINDS[spec.metric].unit, "below": spec.low, "window_s": spec.seconds,
        "shipped": rule.shipped, "problem": rule.problem, "created_by": rule.created_by, "created_at": rule.created_at,
        "firing": firing,
    }  # fmt: skip
    return RuleView.model_validate(fields)


def rule_detail(session: Session, rule: AlertRule) -> RuleView:
    """The same with how many alerts of it fire."""
    return rule_view(rule, repository.firing(session, rule.id))


# -- alerts


def get_alert(session: Session, fleet_id: str, alert_id: str) -> Alert:
    """One alert.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    found = repository.alert(session, fleet_id, alert_id)
    if found is None:
        raise NotFoundError("alert", alert_id, remedy="list them with `shoal alert ls`")
    return found


def acknowledge(session: Session, found: Alert, comment: str, *, actor: Who) -> Alert:
    """Somebody looks after it: it is not told again. Done again, the comment is replaced.

    Raises:
        ConflictError: when it is over.
    """
    if found.state == AlertState.RESOLVED.value:
        raise ConflictError("alert_resolved", f"alert {found.id} has resolved: there is nothing to look after")
    found.acknowledged_at, found.acknowledged_by, found.comment = utc_now(), str(actor), comment
    session.flush()
    said = {"rule": found.rule, "subject": found.subject, "comment": comment}
    _record(session, found, actor, "alert.acknowledge", f"alert/{found.id}", after=said)
    return found


def alert_detail(session: Session, found: Alert) -> AlertView:
    """The HTTP shape of an alert, with whether it is silenced."""
    return alert_view(found, silenced=repository.is_silenced(session, found, utc_now()))


def alert_view(found: Alert, *, silenced: bool) -> AlertView:
    """The HTTP shape of an alert."""
    names = AlertView.model_fields.keys() - {"silenced"}
    return AlertView.model_validate({name: getattr(found, name) for name in names} | {"silenced": silenced})


def counts(session: Session, fleet_id: str) -> AlertCounts:
    """Open alerts by state and severity."""
    items = [
        AlertCount.model_validate(dict(zip(AlertCount.model_fields, one, strict=True)))
        for one in sorted(repository.counts(session, fleet_id, utc_now()))
    ]
    firing = [one for one in items if one.state is AlertState.FIRING]
    return AlertCounts(
        pending=sum(one.count for one in items if one.state is AlertState.PENDING),
        firing=sum(one.count for one in firing),
        unacknowledged=sum(one.count for one in firing if not one.acknowledged and not one.silenced),
        items=items,
    )


# -- routes


def create_route(session: Session, settings: Settings, fleet_id: str, wanted: RouteCreate, *, actor: Who) -> AlertRoute:
    """Add a route; it is told of what fires already.

    Raises:
        ConflictError: when the fleet has one of that name.
        InvalidError: for e-mail where no mail server is set, and where the fleet has too many routes.
    """
    if repository.named(session, AlertRoute, fleet_id, wanted.name) is not None:
        raise ConflictError(
            "alert_route_exists", f"there is an alert route {wanted.name!r} already: change or delete it"
        )
    if repository.count(session, AlertRoute, fleet_id) >= MOST_ROUTES:
        raise InvalidError("too_many_alert_routes", f"the fleet has {MOST_ROUTES} alert routes: delete one first")
    if wanted.kind is RouteKind.EMAIL and settings.smtp_host is None:
        raise InvalidError(
            "no_mail_server",
            "kind: the server has no mail server: set SHOAL_SMTP_HOST and SHOAL_SMTP_FROM",
            field="kind",
        )
    spec = wanted.model_dump(mode="json", exclude={"name"})
    route = AlertRoute(fleet_id=fleet_id, name=wanted.name, spec=spec, created_by=str(actor))
    session.add(route)
    session.flush()
    for rule in repository.rows_of(session, AlertRule, fleet_id):
        if wanted.wants(rule.name, RuleSpec.model_validate(rule.spec).severity) and repository.firing(session, rule.id):
            repository.note_news(session, rule.id, [route.id], utc_now())
    _record(session, route, actor, "alert_route.create", f"alert-route/{route.name}", after=spec)
    return route


def get_route(session: Session, fleet_id: str, name: str) -> AlertRoute:
    """One route.

    Raises:
        NotFoundError: when the fleet has none of that name.
    """
    route = repository.named(session, AlertRoute, fleet_id, name)
    if route is None:
        raise NotFoundError("alert_route", name, remedy="list them with `shoal alert route ls`")
    return route


def change_route(session: Session, route: AlertRoute, change: RouteUpdate, *, actor: Who) -> AlertRoute:
    """Change a route; what it was not told of while it was off, it is told then.

    Raises:
        InvalidError: naming the field, where what comes of it is no route.
    """
    before = dict(route.spec)
    given = {name: value for name, value in change.model_dump(mode="json").items() if value is not None}
    route.spec = _checked(RouteSpec, {**before, **given}).model_dump(mode="json")
    session.flush()
    _record(session, route, actor, "alert_route.update", f"alert-route/{route.name}", before=before, after=route.spec)
    return route


def delete_route(session: Session, route: AlertRoute, *, actor: Who) -> None:
    """Tell it nothing more; e-mails of it that wait go too."""
    _record(session, route, actor, "alert_route.delete", f"alert-route/{route.name}", before=route.spec)
    session.delete(route)
    session.flush()


def send_test(session: Session, route: AlertRoute, *, actor: Who) -> RouteTest:
    """Send a test notice by it, whether it is on or not."""
    notice = Notice(route.fleet_id, "test", rule="", severity="info", metric="")
    put(session, route, notice)
    _record(session, route, actor, "alert_route.test", f"alert-route/{route.name}")
    told = {
        RouteKind.WEBHOOK: "webhooks that want shoal.alert.test: see `shoal webhook deliveries`",
        RouteKind.EMAIL: "its addresses: see `shoal alert route show` for what the mail server says",
        RouteKind.MQTT: f"the topic shoal/v1/alerts/{route.fleet_id}",
    }[RouteSpec.model_validate(route.spec).kind]
    return RouteTest(route=route.name, told=told)


def route_view(route: AlertRoute, mails: tuple[int, int, str] | None = None) -> RouteView:
    """The HTTP shape of a route."""
    fields: dict[str, Any] = RouteSpec.model_validate(route.spec).model_dump() | {
        "id": route.id, "name": route.name, "shipped": route.shipped, "created_by": route.created_by,
        "created_at": route.created_at,
    }  # fmt: skip
    if mails is not None:
        fields["waiting"], fields["dead"], fields["last_detail"] = mails
    return RouteView.model_validate(fields)


def route_detail(session: Session, route: AlertRoute) -> RouteView:
    """The same with what became of its e-mails."""
    return route_view(route, repository.mail_counts(session, route.id))


# -- silences


def create_silence(session: Session, fleet_id: str, wanted: SilenceCreate, *, actor: Who) -> AlertSilence:
    """Tell nobody of what matches, for a while.

    Raises:
        InvalidError: for times that make no silence, and a query that can't be read.
    """
    now = utc_now()
    starts, ends = in_utc(wanted.starts_at, "starts_at") or now, in_utc(wanted.ends_at, "ends_at")
    assert ends is not None
    if ends <= max(starts, now):
        raise InvalidError("bad_silence", "ends_at: it must be after starts_at, and ahead", field="ends_at")
    if ends - max(starts, now) > LONGEST_SILENCE:
        raise InvalidError("bad_silence", "ends_at: a silence lasts for a year at most", field="ends_at")
    _check_query(session, fleet_id, wanted.query)
    silence = AlertSilence(
        fleet_id=fleet_id,
        rule=wanted.rule,
        query=wanted.query,
        subject=wanted.subject,
        starts_at=starts,
        ends_at=ends,
        comment=wanted.comment,
        created_by=str(actor),
    )
    session.add(silence)
    session.flush()
    _record(
        session, silence, actor, "alert_silence.create", f"alert-silence/{silence.id}",
        after=wanted.model_dump(mode="json"),
    )  # fmt: skip
    return silence


def get_silence(session: Session, fleet_id: str, silence_id: str) -> AlertSilence:
    """One silence.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    silence = repository.silence(session, fleet_id, silence_id)
    if silence is None:
        raise NotFoundError("alert_silence", silence_id, remedy="list them with `shoal alert silence ls`")
    return silence


def delete_silence(session: Session, silence: AlertSilence, *, actor: Who) -> None:
    """End a silence: what fires and was not told is told then."""
    shown = silence_view(silence).model_dump(mode="json", include={"rule", "query", "subject", "ends_at", "comment"})
    _record(session, silence, actor, "alert_silence.delete", f"alert-silence/{silence.id}", before=shown)
    session.delete(silence)
    session.flush()


def silence_view(silence: AlertSilence) -> SilenceView:
    """The HTTP shape of a silence."""
    names = SilenceView.model_fields.keys() - {"active"}
    active = silence.starts_at <= utc_now() < silence.ends_at
    return SilenceView.model_validate({name: getattr(silence, name) for name in names} | {"active": active})


def _check_query(session: Session, fleet_id: str, query: str | None) -> None:
    if query is not None:
        query_condition(session, fleet_id, query, field="query")


def _checked(shape: type[SpecT], fields: dict[str, Any]) -> SpecT:
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        detail = str(first["msg"]).removeprefix("Value error, ")
        field = str(first["loc"][0]) if first["loc"] else detail.partition(":")[0]
        said = detail if detail.startswith(f"{field}:") else f"{field}: {detail}"
        raise InvalidError("invalid", said, field=field) from None


def _record(
    session: Session,
    of: AlertRule | AlertRoute | AlertSilence | Alert,
    actor: Who,
    action: str,
    subject: str,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    audit.record(session, fleet_id=of.fleet_id, actor=actor, action=action, subject=subject, before=before, after=after)
