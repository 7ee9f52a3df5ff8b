"""What is wrong with an uploaded version is told before anything of it is written; by a real conversion process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import SourceFormat, SourceFormCreate, UploadView, VersionCreate
from fleet_server.conversions.inspector import ProcessInspector
from fleet_server.errors import InvalidError
from fleet_server.settings import Settings
from tests.fleet import write_classifier


def kept(path: Path) -> UploadView:
    raise AssertionError(f"{path} is kept of a version that was refused")


def test_one_that_takes_too_long_is_ended_and_the_setting_that_says_so_is_named(tmp_path: Path) -> None:
    artifacts = ArtifactStore.open(None, folder=tmp_path / "artifacts")
    write_classifier(tmp_path / "m.onnx")
    digest, _ = artifacts.put_file(tmp_path / "m.onnx")
    inspector = ProcessInspector(artifacts, Settings(state_dir=tmp_path / "state", inspect_timeout_s=0.05))
    wanted = VersionCreate(name="1", sources=[SourceFormCreate(format=SourceFormat.ONNX, digest=digest)])
    with pytest.raises(InvalidError) as refused:
        inspector.inspect(wanted, kept)
    assert refused.value.detail == "it took longer than 0.05 s (SHOAL_INSPECT_TIMEOUT_S)"
    assert list((tmp_path / "state" / "conversions").iterdir()) == []
