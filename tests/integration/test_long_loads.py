"""A runtime that compiles for seconds before it runs: the report says how long, and what it made is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import agent.inference
from agent.protocol.lifecycle import Phase
from tests import vendor_runtime
from tests.fleet import wait_until, write_classifier
from tests.real_device import RealDevice, manifest

COMPILES = vendor_runtime.MODULE.replace(
    "        self._net = ReferenceEvaluator",
    """        import time
        if not (compiled / "engine").exists():
            time.sleep(3)
            compiled.mkdir()
            (compiled / "engine").write_text("compiled")
        self._net = ReferenceEvaluator""",
)


def test_a_load_that_compiles_is_reported_and_its_work_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor_runtime.install(tmp_path, monkeypatch, module=COMPILES)
    monkeypatch.setattr(agent.inference, "LOADING_S", 0.5)
    path = tmp_path / "m.onnx"
    write_classifier(path)
    net = manifest(path, "1", runtime=vendor_runtime.NAME)
    with RealDevice(tmp_path / "device", monkeypatch, hang_s=1.0) as device:
        one = device.deployment("d1", path, "1")
        device.desire(msgspec.structs.replace(one, manifest=msgspec.Raw(msgspec.json.encode(net))))

        def said() -> float:
            found = device.report("d1")
            return found.loading_s if found is not None else 0.0

        assert wait_until("the time it takes", said) >= 0.5
        assert device.await_phase("d1", Phase.ACTIVE).loading_s == 0
        assert device.link is not None
        (serving,) = device.link.reports[-1].serving
        assert (serving.runtime, serving.provider) == ("acme 3.1", "npu")
        assert not device.link.reports[-1].problems, "nothing was taken for a hang"
    assert len(list((tmp_path / "device").rglob(f"{net.digest}.compiled/engine"))) == 1
