"""The job that cuts a net, from a file to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from agent.protocol.manifest import ModelFormat
from converters.errors import ConversionError
from converters.job import DataFile, ShardDevice, Sharding, ShardJob, SourceFile
from converters.pipeline import run
from converters.sharding.cutter import run_stages
from converters.sharding.graph import open_session
from tests.deep_net import write_deep

WIDTH = 64


def _job(path: Path, *memory: float, stages: int | None = None, rows: int = 1) -> ShardJob:
    devices = tuple(ShardDevice(f"d{number}", size) for number, size in enumerate(memory))
    return ShardJob(SourceFile(ModelFormat.ONNX, "0" * 64, str(path)), devices, stages, rows)


def _silent(_: float, __: str) -> None:
    pass


def test_a_net_too_big_for_any_device_is_cut_for_all_of_them(tmp_path: Path) -> None:
    layer = WIDTH * WIDTH * 4
    path = write_deep(tmp_path / "net.onnx", WIDTH)
    rows = np.random.default_rng(1).normal(size=(20, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    job = _job(path, layer * 3, layer * 2.5, layer * 2.5)
    job = ShardJob(job.source, job.devices, None, 1, None, DataFile("1" * 64, str(tmp_path / "rows.npz")))
    found = run(job, tmp_path, _silent)
    assert isinstance(found, Sharding)
    assert found.exact
    assert found.difference <= 1e-5
    assert len(found.stages) == 3, "two devices hold five and a half layers of six"
    limits = {one.device: one.memory for one in job.devices}
    for stage in found.stages:
        assert stage.weight_bytes + stage.activation_bytes <= limits[stage.device]
    assert sum(stage.weight_bytes for stage in found.stages) == 6 * layer
    assert sum(stage.nodes for stage in found.stages) == 12
    models = [onnx.load(tmp_path / stage.path) for stage in found.stages]
    whole = open_session(onnx.load(path), plain=False).run(None, {"x": rows})[0]
    assert np.abs(run_stages(models, {"x": rows})[-1]["y"] - whole).max() <= 1e-5
    second = found.stages[1].evaluation
    assert second is not None
    with np.load(tmp_path / second.path) as arrays:
        (name,) = arrays.files
        assert name == models[1].graph.input[0].name
        assert arrays[name].shape == (20, WIDTH)


def test_bad_orders_are_refused_with_what_is_at_fault(tmp_path: Path) -> None:
    path = write_deep(tmp_path / "net.onnx", WIDTH, 2)
    with pytest.raises(ConversionError, match="a piece of the net that can't be cut needs") as caught:
        run(_job(path, 100.0, 100.0), tmp_path, _silent)
    assert (caught.value.code, caught.value.field) == ("no_plan", "memory")
    with pytest.raises(ConversionError, match="3 stages need 3 devices") as caught:
        run(_job(path, 1e9, 1e9, stages=3), tmp_path, _silent)
    assert caught.value.field == "stages"
    with pytest.raises(ConversionError, match="none were given"):
        run(_job(path), tmp_path, _silent)
