"""What rules look at: one query a rule over its whole fleet, served by an index. Reads only.

A finder gives every subject that has a value; of metrics that are not `counted`, every subject that the rule holds for.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import String, and_, case, func, literal_column, or_, select
from sqlalchemy.orm import InstrumentedAttribute, aliased

from fleet_server.alerts.drift import METRICS as DRIFTS
from fleet_server.alerts.drift import Drift, find_drift
from fleet_server.alerts.scope import Rows, Scope
from fleet_server.alerts.subjects import Findings, Found, Subject
from fleet_server.alerts.windows import find_accuracy, find_latency, find_rates, find_throughput
from fleet_server.domain.alerting import Metric
from fleet_server.domain.states import RolloutState
from fleet_server.models import (
    Deployment,
    Device,
    DeviceAttribute,
    DeviceCertificate,
    HostWindowRow,
    Model,
    Rollout,
    Version,
)

SILENT_INTERVALS = 6  # of telemetry, after which a device that is said to be connected counts as gone
SILENT_S = 60.0  # at least
STALE_S = 900.0  # what a device said of itself longer ago does not count
DAY_S = 86_400.0
MOVING = (RolloutState.RUNNING.value, RolloutState.REVERTING.value)
# SQLite takes a partial index only where the query says its condition, word for word.
ROLLED_BACK, NOTHING = literal_column("'rolled_back'", String()), literal_column("''", String())
_HOST: dict[Metric, InstrumentedAttribute[float | None]] = {
    Metric.TEMPERATURE_C: HostWindowRow.temperature_c,
    Metric.CPU_PERCENT: HostWindowRow.cpu_percent,
    Metric.MEMORY_PERCENT: HostWindowRow.memory_used_mb,
    Metric.AGENT_MEMORY_MB: HostWindowRow.agent_rss_mb,
    Metric.DISK_FREE_MB: HostWindowRow.disk_free_mb,
}


def find(scope: Scope) -> Drift:
    """What a rule's subjects are like now, and what is to be kept for later looks."""
    if scope.spec.metric in DRIFTS:
        return find_drift(scope)
    return Drift(_FINDERS[scope.spec.metric](scope))


def offline(scope: Scope) -> Rows:
    """Devices that are not connected, or are said to be and say nothing: a broker that dies tells of nobody."""
    silent = scope.ago(max(SILENT_S, SILENT_INTERVALS * scope.interval_s))
    gone = or_(Device.online.is_(False), Device.last_seen_at < silent)
    return select(Device.id, Device.last_seen_at).where(*scope.devices(), Device.last_seen_at.is_not(None), gone)


def _find_offline(scope: Scope) -> Findings:
    return {
        Subject(device_id): Found(max((scope.now - seen).total_seconds(), 0.0), f"last heard of at {seen:%F %T} UTC")
        for device_id, seen in scope.session.execute(offline(scope))
    }


def hosts(scope: Scope) -> Rows:
    """What each device said last of itself, and how much memory it has, in MiB."""
    row, column = HostWindowRow, _HOST[scope.spec.metric]
    newest = select(func.max(row.id)).where(row.fleet_id == Device.fleet_id, row.device_id == Device.id)
    memory = select(func.max(DeviceAttribute.number)).where(
        DeviceAttribute.device_id == Device.id, DeviceAttribute.name == "memory_mb"
    )
    return (
        select(Device.id, column, memory.correlate(Device).scalar_subquery())
        .join(row, row.id == newest.correlate(Device).scalar_subquery())
        .where(*scope.devices(), row.ended_at >= scope.ago(STALE_S), column.is_not(None))
    )


def _find_hosts(scope: Scope) -> Findings:
    found: Findings = {}
    for device_id, value, memory in scope.session.execute(hosts(scope)):
        if scope.spec.metric is not Metric.MEMORY_PERCENT:
            found[Subject(device_id)] = Found(value)
        elif memory:
            found[Subject(device_id)] = Found(100.0 * value / memory, f"{value:.0f} of {memory:.0f} MiB")
    return found


def certificates(scope: Scope) -> Rows:
    """The certificate of each device that is valid for longest."""
    row = DeviceCertificate
    last = (
        select(row.device_id, func.max(row.not_after).label("not_after"))
        .where(row.fleet_id == scope.fleet_id, row.revoked_at.is_(None), row.device_id.in_(scope.ids()))
        .group_by(row.device_id)
        .subquery()
    )
    return select(row.device_id, row.not_before, row.not_after).join(
        last,
        and_(row.fleet_id == scope.fleet_id, row.device_id == last.c.device_id, row.not_after == last.c.not_after),
    )


def _find_certificates(scope: Scope) -> Findings:
    found: Findings = {}
    for device_id, begins, ends in scope.session.execute(certificates(scope)):
        left = (ends - scope.now).total_seconds()
        whole = (ends - begins).total_seconds()
        percent = 100.0 * left / whole if whole > 0 else 0.0
        value = left / DAY_S if scope.spec.metric is Metric.CERTIFICATE_DAYS else percent
        found[Subject(device_id)] = Found(value, f"it ends at {ends:%F %T} UTC")
    return found


def fell_back(scope: Scope) -> Rows:
    """What another execution provider runs than was wanted first."""
    query = (
        select(Deployment.device_id, Model.name, Deployment.fell_back)
        .join(Model, Model.id == Deployment.model_id)
        .where(
            Deployment.fleet_id == scope.fleet_id,
            Deployment.fell_back != NOTHING,
            Deployment.desired.is_(True),
            # As an expression: else SQLite reads all deployments of the fleet's devices to find the few of its index.
            Deployment.device_id.concat("").in_(scope.ids()),
        )
    )
    return query if scope.spec.model is None else query.where(Model.name == scope.spec.model)


def _find_fell_back(scope: Scope) -> Findings:
    return {Subject(row[0], row[1]): Found(1.0, row[2]) for row in scope.session.execute(fell_back(scope))}


def rolled_back(scope: Scope) -> Rows:
    """What devices took back by themselves lately, and where no later deployment of the model has come to be active."""
    later = aliased(Deployment)
    came = select(later.id).where(
        later.device_id == Deployment.device_id,
        later.model_id == Deployment.model_id,
        later.id > Deployment.id,
        later.phase == "active",
        later.revert_of == "",
    )
    query = (
        select(Deployment.device_id, Model.name, Version.name, Deployment.failure)
        .join(Model, Model.id == Deployment.model_id)
        .join(Version, Version.id == Deployment.version_id)
        .where(
            Deployment.fleet_id == scope.fleet_id,
            Deployment.phase == ROLLED_BACK,
            Deployment.settled_at >= scope.ago(scope.spec.seconds),
            Deployment.revert_of == "",
            Deployment.device_id.in_(scope.ids()),
            ~came.exists(),
        )
        .order_by(Deployment.id)
    )
    return query if scope.spec.model is None else query.where(Model.name == scope.spec.model)


def _find_rolled_back(scope: Scope) -> Findings:
    found: Findings = {}
    for device_id, model, version, failure in scope.session.execute(rolled_back(scope)):
        why = (failure or {}).get("detail", "")
        found[Subject(device_id, model)] = Found(1.0, f"version {version}: {why}" if why else f"version {version}")
    return found


def moving(scope: Scope) -> Rows:
    """Rollouts that ought to move: when something last did, and how many deployments are under way, not on purpose."""
    row = Deployment
    under_way = and_(row.sent_at.is_not(None), row.settled_at.is_(None), row.is_waiting.is_(False))
    query = (
        select(
            Rollout.id,
            Rollout.name,
            Rollout.stage_started_at,
            func.max(row.sent_at),
            func.max(row.serving_at),
            func.max(row.settled_at),
            func.sum(case((under_way, 1), else_=0)),
        )
        .join(row, row.rollout_id == Rollout.id)
        .where(Rollout.fleet_id == scope.fleet_id, Rollout.state.in_(MOVING))
        .group_by(Rollout.id, Rollout.name, Rollout.stage_started_at)
    )
    if scope.spec.model is not None:
        named = select(Version.id).join(Model, Model.id == Version.model_id)
        of_model = named.where(Model.fleet_id == scope.fleet_id, Model.name == scope.spec.model)
        query = query.where(Rollout.version_id.in_(of_model))
    return query


def _find_stuck(scope: Scope) -> Findings:
    found: Findings = {}
    for rollout_id, name, *times, under_way in scope.session.execute(moving(scope)):
        moved = max((one for one in times if one is not None), default=None)
        if moved is not None and under_way:
            value = max((scope.now - moved).total_seconds(), 0.0)
            said = f"{name or rollout_id}: {under_way} deployments are under way, the last moved at {moved:%F %T} UTC"
            found[Subject(rollout_id=rollout_id)] = Found(value, said)
    return found


_FINDERS: dict[Metric, Callable[[Scope], Findings]] = {
    Metric.OFFLINE: _find_offline,
    **dict.fromkeys(_HOST, _find_hosts),
    Metric.CERTIFICATE_DAYS: _find_certificates,
    Metric.CERTIFICATE_PERCENT: _find_certificates,
    Metric.LATENCY_P50_MS: find_latency,
    Metric.LATENCY_P95_MS: find_latency,
    Metric.LATENCY_P99_MS: find_latency,
    Metric.ERROR_PERCENT: find_rates,
    Metric.REJECTED_PERCENT: find_rates,
    Metric.THROUGHPUT_PER_S: find_throughput,
    Metric.ACCURACY_PERCENT: find_accuracy,
    Metric.FELL_BACK: _find_fell_back,
    Metric.ROLLED_BACK: _find_rolled_back,
    Metric.ROLLOUT_STUCK_S: _find_stuck,
}
