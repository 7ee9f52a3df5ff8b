"""The server is killed while it has a variant built, here and on Dask: it is built again, and never twice at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import Cluster, conversions_of
from tests.fleet import LocalFleet, wait_until, write_classifier

PRECISIONS = ["fp32", "fp16", "int8", "dynamic-int8", "weight-int8", "weight-int4"]


class Setting:
    """A server, perhaps with a cluster, and a version whose variant takes some seconds to build."""

    def __init__(self, folder: Path, *, dask: bool) -> None:
        self.fleet = LocalFleet(folder)
        self.cluster = Cluster(folder) if dask else None
        if self.cluster is not None:
            self.cluster.start_scheduler()
            self.cluster.start_worker("worker-1")
            self.cluster.start_worker("worker-2")

    def start_server(self) -> None:
        self.fleet.start_server(**({"SHOAL_DASK_SCHEDULER": self.cluster.url} if self.cluster else {}))

    def ask(self) -> str:
        self.fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": PRECISIONS})
        write_classifier(self.fleet.folder / "model.onnx", hidden=256)
        self.fleet.push("m", "1", self.fleet.folder / "model.onnx")
        asked = self.fleet.post("/variants", {"version": "m@1", "profiles": ["any"]}, status=202)
        return str(asked[0]["id"])

    def builds(self) -> list[psutil.Process]:
        """Every conversion process of this setting."""
        holders = self.cluster.processes if self.cluster else self.fleet.processes
        return [one for name, holder in holders.items() if name != "scheduler" for one in conversions_of(holder.pid)]

    def variant(self, variant: str) -> dict[str, Any]:
        return dict(self.fleet.get(f"/variants/{variant}"))

    def stop(self) -> None:
        self.fleet.stop()
        if self.cluster is not None:
            self.cluster.stop()


@pytest.fixture(params=["here", "dask"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Setting]:
    setting = Setting(tmp_path, dask=request.param == "dask")
    try:
        setting.start_server()
        yield setting
    finally:
        setting.stop()


def test_a_killed_server_builds_again_when_its_lease_ran_out(setting: Setting) -> None:
    variant = setting.ask()
    orphans = wait_until("the build", setting.builds)
    setting.fleet.kill("server")
    wait_until("the orphan's end", lambda: not any(map(psutil.Process.is_running, orphans)), 5)
    setting.start_server()
    most = 0
    deadline = time.monotonic() + 120
    while (found := setting.variant(variant))["state"] in {"queued", "building"}:
        most = max(most, len(setting.builds()))
        assert time.monotonic() < deadline, found["job"]
        time.sleep(0.05)
    assert found["state"] == "ready", found["failure"] or found["gate"]
    assert (found["job"]["attempts"], most) == (2, 1)


def test_a_cancelled_build_ends_within_seconds_and_can_be_built_again(setting: Setting) -> None:
    variant = setting.ask()
    children = wait_until("the build", setting.builds)
    asked = time.monotonic()
    cancelled = setting.fleet.post(f"/variants/{variant}/cancel", status=200)
    assert cancelled["state"] == "cancelled"
    wait_until("its end", lambda: not any(map(psutil.Process.is_running, children)), 5)
    print("ended after", time.monotonic() - asked)
    time.sleep(2)
    assert setting.variant(variant)["state"] == "cancelled"
    assert setting.builds() == []
    wait_until("its folder's end", lambda: not list((setting.fleet.folder / "server" / "conversions").iterdir()), 10)
    (built,) = setting.fleet.build("m@1", "any")
    assert (built["id"], built["state"]) == (variant, "ready")
