"""The REST API in this process, and one row or more of everything that it lists."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from agent.protocol.release import AGENT
from fleet_server.agent_releases.repository import AGENT_KIND
from fleet_server.alerts.schemas import RouteSpec, RuleSpec
from fleet_server.app import create_app, running
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import (
    AccessToken,
    Alert,
    AlertRoute,
    AlertRule,
    AlertSilence,
    CommandLogLine,
    Deployment,
    Device,
    DeviceCommand,
    DeviceIdentity,
    Enrolment,
    EnrolmentToken,
    Fleet,
    GateRun,
    Grant,
    HostWindowRow,
    Model,
    ModelDrift,
    ModelWindowRow,
    Profile,
    Rollout,
    SampleRequestRow,
    SampleUpload,
    SamplingRule,
    ShardPlan,
    TelemetryGroup,
    TelemetrySeries,
    User,
    Variant,
    Version,
    Webhook,
    WebhookDelivery,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from tests import sqlite_file

TOKEN = "the-admin-of-tests"
SAMPLING = {"samples": 1, "megabytes": 1.0, "sample_megabytes": 1.0, "days": 1.0, "below": 0.5}
ALERT_RULE = RuleSpec.model_validate({"metric": "cpu_percent", "threshold": 99, "enabled": False}).model_dump()
ALERT_ROUTE = RouteSpec.model_validate({"kind": "mqtt", "enabled": False}).model_dump()
STAGE = {
    "model": "model-0.stage-1-of-1", "version": "1", "device": "dev-0", "nodes": 1, "compute_s": 1.0,
    "weight_bytes": 1, "activation_bytes": 1, "memory_limit": 1, "bytes_in": 1, "bytes_out": 1, "transfer_s": 0.0,
    "speed": 1.0, "rollout": None, "serves": False,
}  # fmt: skip
PROOF = {"difference": 0.0, "exact": True, "quantized": False, "whole_s": 1.0}
SPEC = {"match": {}, "runtime": "onnx"}


@contextmanager
def serving(folder: Path, database_url: str | None, **settings: Any) -> Iterator[FastAPI]:
    """The application without a broker that answers and without conversions; without a URL on a database of its own."""
    if database_url is None:
        sqlite_file.put(folder)
    settings = {"broker_url": "mqtt://127.0.0.1:1", "conversion_workers": 0, "request_burst": 100_000, **settings}
    app = create_app(Settings(state_dir=folder, database_url=database_url, admin_token=TOKEN, **settings))
    with running(app):
        yield app


def caller(application: FastAPI, token: str = TOKEN) -> TestClient:
    """A client of it; the server's errors come back as answers."""
    headers = {"Authorization": f"Bearer {token}"}
    return TestClient(application, base_url="http://localhost/api/v1", headers=headers, raise_server_exceptions=False)


def fill(database: Database, count: int) -> dict[str, str]:
    """So many rows of everything, many of them alike; returns what paths name."""
    start = utc_now() - dt.timedelta(days=30)
    fleet = {"fleet_id": DEFAULT_FLEET}
    first: Any = None
    logs: Any = None
    with database.write() as session:

        def add(row: Any) -> Any:
            session.add(row)
            session.flush()
            return row

        agent = add(Model(**fleet, name=AGENT, kind=AGENT_KIND))
        for number in range(count):
            at = start + dt.timedelta(days=number // 2)
            add(Fleet(id=f"fleet-{number}", created_at=at))
            add(Version(**fleet, model_id=agent.id, name=f"1.{number}.0", inputs=[], outputs=[]))
            user = add(User(name=f"user-{number}", password_hash="", created_at=at))
            add(Grant(user_id=user.id, fleet_id=DEFAULT_FLEET, role="viewer" if number % 2 else "operator"))
            token = {"digest": "", "role": "viewer", "created_by": "", "expires_at": at, "created_at": at}
            add(AccessToken(id=f"token{number}", name=f"token-{number}", **fleet, **token))
            add(EnrolmentToken(**fleet, secret_sha256=f"{number}", uses_left=1, created_by="",
                               expires_at=utc_now() + dt.timedelta(days=1 + number // 3)))  # fmt: skip
            add(Enrolment(**fleet, device_id=f"dev-{number // 2}", key_sha256=f"{number}", csr="", reason="",
                          address="", state="pending" if number % 3 else "rejected"))  # fmt: skip
            add(DeviceIdentity(**fleet, device_id=f"dev-{number}", created_by="", created_at=at,
                               revoked_at=at if number % 2 else None))  # fmt: skip
            profile = add(Profile(**fleet, name=f"profile-{number}", spec=SPEC))
            seen = at if number % 3 else None
            device = add(Device(id=f"dev-{number}", **fleet, profile_id=profile.id if number % 2 else None,
                                created_at=at, last_seen_at=seen))  # fmt: skip
            model = add(Model(**fleet, name=f"model-{number}"))
            for name in ("1", "2") if number else [str(one) for one in range(count)]:
                version = add(Version(**fleet, model_id=model.id, name=name, inputs=[], outputs=[]))
            state = "failed" if number % 3 else "queued"
            variant = add(Variant(**fleet, version_id=version.id, profile_id=profile.id, profile_spec=SPEC,
                                  state=state))  # fmt: skip
            run = add(GateRun(**fleet, variant_id=variant.id, state="failed" if number % 3 else "cancelled",
                              candidates=[], data={}, deadline_at=at))  # fmt: skip
            add(ShardPlan(**fleet, version_id=version.id, state="failed", order={}, stages=[STAGE], proof=PROOF,
                          created_by="", created_at=at))  # fmt: skip
            rollout = add(Rollout(**fleet, name=f"rollout-{number % 3}", version_id=version.id, target={"all": True},
                                  state="paused" if number % 3 else "stopped",
                                  strategy={"stages": [{"percent": 100}]}))  # fmt: skip
            first = first or rollout
            add(Deployment(**fleet, rollout_id=first.id, device_id=device.id, model_id=model.id, stage=0,
                           version_id=version.id, variant_id=variant.id,
                           phase="active" if number % 3 else "failed"))  # fmt: skip
            add(SamplingRule(**fleet, model_id=model.id, profile_id=profile.id, created_by="", spec=SAMPLING))
            due = utc_now() + dt.timedelta(days=1 + number // 2)
            asked = add(SampleRequestRow(**fleet, model=model.name, state="running" if number % 2 else "done",
                                         samples=1, size=1, created_by="", deadline_at=due))  # fmt: skip
            add(SampleUpload(**fleet, request_id=asked.id, device_id=device.id, phase="stored", told=False, size=1,
                             digest="a" * 64, stored_at=utc_now(), listing=[]))  # fmt: skip
            add(DeviceCommand(**fleet, device_id=f"dev-{number // 2}", kind="facts", arguments={}, created_by="",
                              state="failed" if number % 3 else "succeeded", deadline_at=at))  # fmt: skip
            logs = logs or add(DeviceCommand(**fleet, device_id=device.id, kind="logs", arguments={}, created_by="",
                                             state="succeeded", deadline_at=at))  # fmt: skip
            add(CommandLogLine(command_id=logs.id, sequence=number + 1, at=0.0, level="INFO", source="agent",
                               logger="agent", text="x"))  # fmt: skip
            hook = add(Webhook(**fleet, url=f"https://hooks.invalid/{number // 2}", types=["shoal.*"], active=False,
                               secret=f"whsec_{number}", created_by=""))  # fmt: skip
            add(WebhookDelivery(**fleet, webhook_id=hook.id, event_id=f"{number}", type=f"shoal.test.{number % 2}",
                                subject=f"x/{number}", body="{}", next_at=at,
                                state="dead" if number % 2 else "pending"))  # fmt: skip
            rule = add(AlertRule(**fleet, name=f"rule-{number}", spec=ALERT_RULE, created_by="", created_at=at))
            add(AlertRoute(**fleet, name=f"route-{number}", spec=ALERT_ROUTE, created_by="", created_at=at))
            alert = {"metric": "cpu_percent", "severity": "warning", "subject": f"device/dev-{number // 2}"}
            add(Alert(**fleet, **alert, rule_id=rule.id, rule=f"rule-{number // 2}", since=at,
                      state="resolved" if number % 2 else "firing",
                      resolved_at=utc_now() if number % 2 else None))  # fmt: skip
            add(AlertSilence(**fleet, rule="x", ends_at=due, comment="", created_by=""))
            series = add(TelemetrySeries(**fleet, device_id=device.id, deployment_id="", model="m", version="1",
                                         digest="", provider="cpu"))  # fmt: skip
            add(ModelDrift(**fleet, device_id=device.id, model="m", version="1", series_id=series.id, requests=1,
                           worst=number // 2, input_drift=number // 2, since=at, at=at))  # fmt: skip
            group = add(TelemetryGroup(**fleet, stored_at=at))
            add(ModelWindowRow(group_id=group.id, number=0, series_id=series.id, started_at=at, ended_at=at,
                               requests=number // 2, errors=number % 2, rejected=0, items=0, latency=b"",
                               confusion=b""))  # fmt: skip
            add(HostWindowRow(device_id=device.id, ended_at=at, **fleet))
        return {
            "model": "model-0", "rollout_id": first.id, "device_id": "dev-0", "variant_id": variant.id,
            "run_id": run.id, "version": "1", "name": "profile-0", "fleet": "fleet-0",
            "command_id": logs.id,
        }  # fmt: skip
