"""What every list, filter and page asks the database is found by an index, on both databases. Nothing is timed."""

from __future__ import annotations

import pytest

from fleet_server.db import Database
from tests.big_fleet import build
from tests.query_plans import Asked, Driver, read_whole
from tests.questions import questions

DEVICES = 60
# Few of them in any fleet, or read by page after page in the order that is asked for.
SMALL = {"fleets", "models", "versions", "profiles", "variants", "rollouts", "sample_requests", "webhooks", "constant"}


def test_no_question_reads_a_large_table_from_end_to_end(database: Database) -> None:
    fleet = build(database, DEVICES)
    asked, driver = Asked(database, telemetry_hours_days=7), Driver(database)
    try:
        found = {}
        for question in questions(fleet):
            plans = [driver.plan(one, indices_only=True) for one in asked.statements(question.path)]
            assert plans, question.name
            whole = set().union(*map(read_whole, plans)) - SMALL
            if whole:
                found[question.name] = whole
        assert found == {}
    finally:
        driver.close()
        asked.close()


def test_what_is_asked_past_sqlalchemy_is_among_the_questions(database: Database) -> None:
    build(database, DEVICES)
    asked = Asked(database)
    try:
        asked.statements("/devices?limit=5")  # asks who it is, too
        (one,) = asked.statements("/devices?limit=5")
        assert "FROM devices d " in one.text
    finally:
        asked.close()


# Where SQLite, which knows no sizes, must not take another index: the names of those that it must take.
WANTED = {
    "device: its deployments": "ix_deployments_fleet_id_device_id_id",
    "device: its telemetry": "ix_telemetry_series_fleet_id_device_id_model_version",
    "device: what was done to it": "ix_audit_events_fleet_id_subject_sequence",
    "devices by -created_at": "ix_devices_fleet_id_created_at_id",
    "deployments that failed": "ix_deployments_fleet_id_phase_id",
    "state of devices, newest first": "ix_host_windows_fleet_id_id",
    "requests to enrol": "ix_enrolments_fleet_id_id",
    "telemetry of a version, a day by hours": "ix_telemetry_groups_open",
    "rollouts": "COVERING INDEX ix_deployments_rollout_id_phase",
    "overview": "COVERING INDEX ix_devices_counted",
}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_sqlite_takes_the_index_that_finds_least(database: Database) -> None:
    fleet = build(database, DEVICES)
    asked, driver = Asked(database, telemetry_hours_days=7), Driver(database)
    try:
        for question in questions(fleet):
            if question.name in WANTED:
                steps = [step for one in asked.statements(question.path) for step in driver.plan(one)]
                assert any(WANTED[question.name] in step for step in steps), (question.name, steps)
    finally:
        driver.close()
        asked.close()
