"""The same conversion asked for again: it is not done again, unless what was kept of it is damaged or gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converters.cache import SUFFIX
from fleet_server.catalog.artifacts import DERIVED, ArtifactStore
from fleet_server.catalog.schemas import VariantBuild
from fleet_server.catalog.service import add_upload
from fleet_server.conversions import service
from fleet_server.db import Database
from fleet_server.models import Variant
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from tests.fleet import write_classifier, write_data
from tests.integration.test_scheduler import Bench

# What is kept lies in the artifact store: one database is enough.
pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(database, tmp_path)
    bench.settings = Settings(state_dir=tmp_path / "state")
    bench.store = ArtifactStore.open(None, folder=tmp_path / "state" / "artifacts")
    write_classifier(tmp_path / "model.onnx")
    write_data(tmp_path / "evaluation.npz", rows=200, seed=1)
    bench.source = add_upload(database, bench.store, DEFAULT_FLEET, tmp_path / "model.onnx", actor="test").digest
    bench.evaluation = add_upload(
        database, bench.store, DEFAULT_FLEET, tmp_path / "evaluation.npz", actor="test"
    ).digest
    yield bench
    for one in bench.running:
        one.stop()


def candidate(variant: Variant) -> dict[str, Any]:
    assert variant.state == "ready", variant.failure or variant.gate
    (found,) = (one for one in variant.candidates if one["measurements"])
    return dict(found)


def build_again(bench: Bench, variant_id: str) -> dict[str, Any]:
    with bench.database.write() as session:
        asked = VariantBuild(version="m0@1", profiles=["p0"], rebuild=True)
        assert service.request_builds(session, DEFAULT_FLEET, asked, actor="test") == [variant_id]
    return candidate(bench.settled(variant_id))


def kept(bench: Bench) -> list[Path]:
    return sorted((bench.settings.state_dir / "artifacts" / DERIVED).rglob(f"*{SUFFIX}"))


def test_hit_damage_and_miss(bench: Bench) -> None:
    variant_id = bench.ask()
    bench.start()
    first = candidate(bench.settled(variant_id))
    assert not first["reused"]
    (entry,) = kept(bench)
    again = build_again(bench, variant_id)
    assert again["reused"]
    assert (again["digest"], again["lineage"]) == (first["digest"], first["lineage"])
    timed = {"latency_p50_ms", "latency_p95_ms", "memory_mb"}
    assert {name for name, value in again["measurements"].items() if value != first["measurements"][name]} <= timed
    assert again["measurements"]["latency_p50_ms"] != first["measurements"]["latency_p50_ms"]
    other = candidate(bench.settled(bench.ask()))
    assert other["reused"], "another profile's conversion of the same files"
    entry.write_bytes(entry.read_bytes()[:-1] + b"!")
    rebuilt = build_again(bench, variant_id)
    assert (rebuilt["reused"], rebuilt["digest"]) == (False, first["digest"])
    assert build_again(bench, variant_id)["reused"], "the damaged one was replaced"
    entry.unlink()
    assert not build_again(bench, variant_id)["reused"]


def test_the_same_work_asked_for_twice_at_once_is_done_once(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"conversion_workers": 2})
    asked = [bench.ask(), bench.ask(latency_p95_ms=1000.0)]
    bench.start()
    assert [candidate(bench.settled(one))["reused"] for one in asked] == [False, True]


def test_none_is_kept_where_that_is_the_setting(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"conversion_cache_mb": 0})
    variant_id = bench.ask()
    bench.start()
    assert not candidate(bench.settled(variant_id))["reused"]
    assert not build_again(bench, variant_id)["reused"]
    assert kept(bench) == []
