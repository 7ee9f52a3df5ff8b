"""The spans of a rollout: itself, its stages, deployments, what devices did, and reports of it.

    request that created it ─► rollout ─► stage ─► deployment ─► publish ─► device: run ─► its steps
                                                                                └────────► report handled

A span is made when what it stands for is over. Ids follow from the rows', so whoever makes one knows those around it.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from itertools import pairwise

from sqlalchemy.orm import Session

from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.messages import DeploymentReport
from agent.protocol.trace import SWITCHED, Mark, TraceParent, parse_traceparent
from fleet_server import spans
from fleet_server.models import Deployment, Rollout
from fleet_server.spans import Kind, Span, span_id_of

AGENT = "shoal-agent"
STEPS = {
    "pending": "trust",
    "downloading": "download",
    "verifying": "verify",
    "loading": "load",
    "exposed": "expose",
    "probation": "switch",
    SWITCHED: "probation",
}
GONE = (Phase.FAILED.value, Phase.ROLLED_BACK.value)


def traced(rollout: Rollout) -> TraceParent | None:
    """The span that created a rollout, where it is traced."""
    return parse_traceparent(rollout.traceparent) if rollout.traceparent else None


def traceparent_for(rollout: Rollout) -> str:
    """What a message to a device says of the span that sends it, another each time; empty where nothing is traced."""
    parent = traced(rollout)
    return TraceParent(parent.trace_id, spans.new_span_id()).text if parent else ""


def stages_ended(session: Session, rollout: Rollout, last: int) -> None:
    """Note the stage that is open as over, and those up to another one, which were skipped."""
    parent = traced(rollout)
    if parent is None or rollout.stage_started_at is None:
        return
    now = time.time()
    for stage in range(rollout.stage, last + 1):
        span = Span(
            name="stage",
            trace_id=parent.trace_id,
            span_id=span_id_of("stage", rollout.id, stage),
            parent_id=span_id_of("rollout", rollout.id),
            started_at=rollout.stage_started_at.timestamp() if stage == rollout.stage else now,
            attributes={**_of(rollout), "shoal.stage": stage},
        )
        spans.note(session, span)


def rollout_ended(session: Session, rollout: Rollout) -> None:
    """Note a rollout as over, with the stage that was open."""
    parent = traced(rollout)
    if parent is None:
        return
    stages_ended(session, rollout, rollout.stage)
    bad = rollout.state != "succeeded"
    reason = str(rollout.verdicts[-1].get("reason", "")) if rollout.verdicts else ""
    span = Span(
        name="rollout",
        trace_id=parent.trace_id,
        span_id=span_id_of("rollout", rollout.id),
        parent_id=parent.span_id,
        started_at=rollout.created_at.timestamp(),
        attributes={**_of(rollout), "shoal.rollout.state": rollout.state, "shoal.rollout.name": rollout.name},
        problem=(reason or rollout.state) if bad else "",
    )
    spans.note(session, span)


def _of(rollout: Rollout) -> dict[str, str | int]:
    return {"shoal.rollout": rollout.id, "shoal.fleet": rollout.fleet_id}


def reported(
    session: Session,
    rollout: Rollout,
    deployment: Deployment,
    report: DeploymentReport,
    before: Phase,
    now: dt.datetime,
) -> None:
    """Note what follows from a device's word on a deployment that it brought from one phase to another.

    Args:
        session: of the transaction that handles the report.
        rollout: of the deployment.
        deployment: as it is by now.
        report: what the device said.
        before: the phase that it was in.
        now: when that was handled.
    """
    parent = traced(rollout)
    if parent is None or deployment.phase == before.value:
        return
    facts = {
        **_of(rollout),
        "shoal.deployment": deployment.id,
        "shoal.device": deployment.device_id,
        "shoal.phase": deployment.phase,
    }
    run_id = span_id_of("run", deployment.id)
    handled = Span(
        name=f"report {deployment.phase}",
        trace_id=parent.trace_id,
        span_id=span_id_of("report", deployment.id, deployment.phase, report.attempts, now.isoformat()),
        parent_id=run_id if report.trace is not None else span_id_of("deployment", deployment.id),
        started_at=now.timestamp(),
        kind=Kind.CONSUMER,
        attributes=facts,
    )
    spans.note(session, handled)
    if Phase(deployment.phase) not in SETTLED or before in SETTLED:
        return
    sent_at = (deployment.sent_at or deployment.created_at).timestamp()
    problem = str(deployment.failure.get("detail", "")) if deployment.phase in GONE and deployment.failure else ""
    whole = Span(
        name="deployment",
        trace_id=parent.trace_id,
        span_id=span_id_of("deployment", deployment.id),
        parent_id=span_id_of("stage", rollout.id, deployment.stage),
        started_at=sent_at,
        attributes={**facts, "shoal.revert": bool(deployment.revert_of)},
        problem=problem,
    )
    spans.note(
        session, whole, *_on_device(deployment, report, parent.trace_id, sent_at, now.timestamp(), problem, facts)
    )


def _on_device(
    deployment: Deployment,
    report: DeploymentReport,
    trace_id: str,
    sent_at: float,
    now: float,
    problem: str,
    facts: dict[str, str | int],
) -> list[Span]:
    """What the device did, as it said; by the server's clock."""
    if report.trace is None or not report.trace.marks:
        return []
    places = placed(report.trace.marks, sent_at, now)
    sender = parse_traceparent(report.trace.traceparent)
    known = sender is not None and sender.trace_id == trace_id
    run_id, device_id = span_id_of("run", deployment.id), deployment.device_id
    found = [
        Span(
            name=f"run {report.model}@{report.version}",
            trace_id=trace_id,
            span_id=run_id,
            parent_id=sender.span_id if sender is not None and known else span_id_of("deployment", deployment.id),
            started_at=places[0],
            ended_at=places[-1],
            kind=Kind.CONSUMER,
            service=AGENT,
            instance=device_id,
            attributes=facts,
            problem=problem,
        )
    ]
    for number, ((mark, _), (began, ended)) in enumerate(
        zip(pairwise(report.trace.marks), pairwise(places), strict=True)
    ):
        step = STEPS.get(mark.name)
        if step == "switch" and report.trace.marks[number + 1].name != SWITCHED:
            step = STEPS[SWITCHED]  # it ended before the worker said that it answers
        if step is not None:
            found.append(
                Span(
                    name=step,
                    trace_id=trace_id,
                    span_id=span_id_of("step", deployment.id, number, mark.name),
                    parent_id=run_id,
                    started_at=began,
                    ended_at=ended,
                    service=AGENT,
                    instance=device_id,
                    attributes=facts,
                )
            )
    return found


def placed(marks: Sequence[Mark], sent_at: float, now: float) -> list[float]:
    """When marks were, by the server's clock, in Unix seconds.

    A device says how long ago they were; only the way of its report is missing. None was before the deployment was
    sent, which a report that was long on its way, or a clock that was set, might look like: all move together by as
    little as that takes. None is after the report, and none before the one before it.

    Args:
        marks: in their order.
        sent_at: when the deployment became desired.
        now: when the report was handled.
    """
    times = [now - one.ago_s for one in marks]
    late = max(0.0, sent_at - min(times))
    found: list[float] = []
    for one in times:
        found.append(min(now, max(one + late, found[-1] if found else sent_at)))
    return found


def published(deployments: Sequence[tuple[str, str]], device_id: str, started_at: float) -> list[Span]:
    """The spans of a message that the broker has: one for each deployment of it that is traced.

    Args:
        deployments: their ids, each with the traceparent that the message has for it.
        device_id: whom it is for.
        started_at: when it was handed over; it ends now.
    """
    ended_at = time.time()
    return [
        Span(
            name="publish desired",
            trace_id=own.trace_id,
            span_id=own.span_id,
            parent_id=span_id_of("deployment", deployment_id),
            started_at=started_at,
            ended_at=ended_at,
            kind=Kind.PRODUCER,
            attributes={
                "messaging.system": "mqtt",
                "messaging.operation.type": "send",
                "shoal.deployment": deployment_id,
                "shoal.device": device_id,
            },
        )
        for deployment_id, text in deployments
        if (own := parse_traceparent(text)) is not None
    ]
