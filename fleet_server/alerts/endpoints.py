"""HTTP of alerts, alert rules, routes and silences."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, status

from fleet_server.alerts import repository, service
from fleet_server.alerts.schemas import (
    Acknowledgement,
    AlertCounts,
    AlertView,
    RouteCreate,
    RouteTest,
    RouteUpdate,
    RouteView,
    RuleCreate,
    RuleUpdate,
    RuleView,
    SilenceCreate,
    SilenceView,
)
from fleet_server.clock import utc_now
from fleet_server.domain.alerting import AlertState, Severity
from fleet_server.http import Actor, AppSettings, FleetId, ReadSession, WriteSession
from fleet_server.models import Alert
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["alerts"], route_class=ApiRoute)
AlertPaging = Annotated[PageRequest, Depends(paged(repository.ALERTS))]
RulePaging = Annotated[PageRequest, Depends(paged(repository.RULES))]
RoutePaging = Annotated[PageRequest, Depends(paged(repository.ROUTES))]
SilencePaging = Annotated[PageRequest, Depends(paged(repository.SILENCES))]
AlertId = Annotated[str, Path(description="The alert's id.")]
RuleName = Annotated[str, Path(description="The rule's name.", examples=["offline"])]
RouteName = Annotated[str, Path(description="The route's name.", examples=["webhooks"])]
SilenceId = Annotated[str, Path(description="The silence's id.")]


@router.get("/alerts", summary="List alerts")
def list_alerts(
    session: ReadSession,
    fleet_id: FleetId,
    paging: AlertPaging,
    state: Annotated[AlertState | None, Query(description="Only those in this state.")] = None,
    severity: Annotated[Severity | None, Query(description="Only those of this severity.")] = None,
    rule: Annotated[str | None, Query(description="Only of this rule.")] = None,
    device: Annotated[str | None, Query(description="Only of this device, and of models on it.")] = None,
    model: Annotated[str | None, Query(description="Only of this model.")] = None,
    rollout: Annotated[str | None, Query(description="Only of this rollout.")] = None,
    subject: Annotated[str | None, Query(description="Such as `device/cam-*`; a `*` stands for any text.")] = None,
    acknowledged: Annotated[bool | None, Query(description="Only those that are, or are not, acknowledged.")] = None,
    silenced: Annotated[bool | None, Query(description="Only those that are, or are not, silenced.")] = None,
) -> Page[AlertView]:
    """Alerts, newest first; those that resolved are kept for `SHOAL_ALERT_DAYS`."""
    equal = (
        (Alert.state, state),
        (Alert.severity, severity),
        (Alert.rule, rule),
        (Alert.device_id, device),
        (Alert.model, model),
        (Alert.rollout_id, rollout),
    )
    rows = repository.alerts_page(
        session,
        fleet_id,
        paging,
        equal=equal,
        subject=subject,
        acknowledged=acknowledged,
        silenced=silenced,
        now=utc_now(),
    )
    return page(rows, paging, lambda row: service.alert_view(row[0], silenced=bool(row[1])))


@router.get("/alert-counts", summary="Count open alerts")
def count_alerts(session: ReadSession, fleet_id: FleetId) -> AlertCounts:
    """How many are pending and how many fire, by severity."""
    return service.counts(session, fleet_id)


@router.get("/alerts/{alert_id}", summary="Show an alert", responses=problems("alert_not_found"))
def show_alert(session: ReadSession, fleet_id: FleetId, alert_id: AlertId) -> AlertView:
    """One alert."""
    return service.alert_detail(session, service.get_alert(session, fleet_id, alert_id))


@router.post(
    "/alerts/{alert_id}/acknowledge",
    summary="Acknowledge an alert",
    responses=problems("alert_not_found", "alert_resolved"),
)
def acknowledge_alert(
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    alert_id: AlertId,
    wanted: Acknowledgement,
) -> AlertView:
    """Somebody looks after it: routes are not told again that it fires, only that it resolved."""
    row = service.get_alert(session, fleet_id, alert_id)
    unchanged.check(session, row, lambda: service.alert_detail(session, row))
    return service.alert_detail(session, service.acknowledge(session, row, wanted.comment, actor=actor))


@router.get("/alert-rules", summary="List alert rules")
def list_alert_rules(
    session: ReadSession,
    fleet_id: FleetId,
    paging: RulePaging,
    shipped: Annotated[bool | None, Query(description="Only those that came, or did not come, with Shoal.")] = None,
) -> Page[RuleView]:
    """Rules of the fleet; a new fleet gets those that come with Shoal within seconds."""
    return page(repository.rules_page(session, fleet_id, paging, shipped=shipped), paging, service.rule_view)


@router.post(
    "/alert-rules",
    summary="Create an alert rule",
    status_code=status.HTTP_201_CREATED,
    responses=problems("alert_rule_exists", "too_many_alert_rules", "bad_query"),
)
def create_alert_rule(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: RuleCreate) -> RuleView:
    """It is looked at again and again from now on; what holds for `for_s` seconds fires."""
    return service.rule_detail(session, service.create_rule(session, fleet_id, wanted, actor=actor))


@router.get("/alert-rules/{alert_rule}", summary="Show an alert rule", responses=problems("alert_rule_not_found"))
def show_alert_rule(session: ReadSession, fleet_id: FleetId, alert_rule: RuleName) -> RuleView:
    """One rule, with how many alerts of it fire."""
    return service.rule_detail(session, service.get_rule(session, fleet_id, alert_rule))


@router.patch(
    "/alert-rules/{alert_rule}",
    summary="Change an alert rule",
    responses=problems("alert_rule_not_found", "bad_query"),
)
def change_alert_rule(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, alert_rule: RuleName, change: RuleUpdate
) -> RuleView:
    """Fields that are absent stay as they are; null takes one away. Disabled, its alerts resolve."""
    row = service.get_rule(session, fleet_id, alert_rule)
    unchanged.check(session, row, lambda: service.rule_detail(session, row))
    return service.rule_detail(session, service.change_rule(session, row, change, actor=actor))


@router.delete(
    "/alert-rules/{alert_rule}",
    summary="Delete an alert rule",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("alert_rule_not_found"),
)
def delete_alert_rule(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, alert_rule: RuleName
) -> None:
    """Its alerts resolve, and stay in the list. One that came with Shoal does not come again."""
    row = service.get_rule(session, fleet_id, alert_rule)
    unchanged.check(session, row, lambda: service.rule_detail(session, row))
    service.delete_rule(session, row, actor=actor)


@router.get("/alert-routes", summary="List alert routes")
def list_alert_routes(session: ReadSession, fleet_id: FleetId, paging: RoutePaging) -> Page[RouteView]:
    """Who is told of alerts."""
    return page(repository.routes_page(session, fleet_id, paging), paging, service.route_view)


@router.post(
    "/alert-routes",
    summary="Create an alert route",
    status_code=status.HTTP_201_CREATED,
    responses=problems("alert_route_exists", "too_many_alert_routes", "no_mail_server"),
)
def create_alert_route(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: RouteCreate
) -> RouteView:
    """It is told of what fires by now, and of what comes."""
    return service.route_detail(session, service.create_route(session, settings, fleet_id, wanted, actor=actor))


@router.get("/alert-routes/{alert_route}", summary="Show an alert route", responses=problems("alert_route_not_found"))
def show_alert_route(session: ReadSession, fleet_id: FleetId, alert_route: RouteName) -> RouteView:
    """One route, with what became of its e-mails."""
    return service.route_detail(session, service.get_route(session, fleet_id, alert_route))


@router.patch(
    "/alert-routes/{alert_route}", summary="Change an alert route", responses=problems("alert_route_not_found")
)
def change_alert_route(
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    alert_route: RouteName,
    change: RouteUpdate,
) -> RouteView:
    """Fields that are absent stay as they are."""
    row = service.get_route(session, fleet_id, alert_route)
    unchanged.check(session, row, lambda: service.route_detail(session, row))
    return service.route_detail(session, service.change_route(session, row, change, actor=actor))


@router.delete(
    "/alert-routes/{alert_route}",
    summary="Delete an alert route",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("alert_route_not_found"),
)
def delete_alert_route(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, alert_route: RouteName
) -> None:
    """E-mails of it that wait go too."""
    row = service.get_route(session, fleet_id, alert_route)
    unchanged.check(session, row, lambda: service.route_detail(session, row))
    service.delete_route(session, row, actor=actor)


@router.post(
    "/alert-routes/{alert_route}/test",
    summary="Send a test notice",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems("alert_route_not_found"),
)
def test_alert_route(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, alert_route: RouteName
) -> RouteTest:
    """By this route, whether it is on or not; the answer says where to look for it."""
    row = service.get_route(session, fleet_id, alert_route)
    unchanged.check(session, row, lambda: service.route_detail(session, row))
    return service.send_test(session, row, actor=actor)


@router.get("/alert-silences", summary="List silences")
def list_alert_silences(
    session: ReadSession,
    fleet_id: FleetId,
    paging: SilencePaging,
    active: Annotated[bool | None, Query(description="Only those that hold now, or do not.")] = None,
) -> Page[SilenceView]:
    """Silences, newest first; those that ended are kept for `SHOAL_ALERT_DAYS`."""
    rows = repository.silences_page(session, fleet_id, paging, active=active, now=utc_now())
    return page(rows, paging, service.silence_view)


@router.post(
    "/alert-silences",
    summary="Silence alerts",
    status_code=status.HTTP_201_CREATED,
    responses=problems("bad_silence", "bad_query", "bad_time"),
)
def create_alert_silence(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: SilenceCreate) -> SilenceView:
    """Nobody is told of what matches while it holds; what still fires at its end is told then."""
    return service.silence_view(service.create_silence(session, fleet_id, wanted, actor=actor))


@router.get("/alert-silences/{silence_id}", summary="Show a silence", responses=problems("alert_silence_not_found"))
def show_alert_silence(session: ReadSession, fleet_id: FleetId, silence_id: SilenceId) -> SilenceView:
    """One silence."""
    return service.silence_view(service.get_silence(session, fleet_id, silence_id))


@router.delete(
    "/alert-silences/{silence_id}",
    summary="End a silence",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("alert_silence_not_found"),
)
def delete_alert_silence(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, silence_id: SilenceId
) -> None:
    """What fires and was not told because of it is told."""
    row = service.get_silence(session, fleet_id, silence_id)
    unchanged.check(session, row, lambda: service.silence_view(row))
    service.delete_silence(session, row, actor=actor)
