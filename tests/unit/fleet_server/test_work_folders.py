"""Working folders of conversions that outlived their process."""

from __future__ import annotations

from pathlib import Path

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.conversions.files import LOCK_FILE, sweep_work_folders, work_folder


def test_only_folders_that_nobody_holds_are_swept(tmp_path: Path) -> None:
    store, parent = ArtifactStore.open(None, folder=tmp_path / "store"), tmp_path / "conversions"
    assert sweep_work_folders(parent) == []
    left = parent / "left"
    left.mkdir(parents=True)
    (left / LOCK_FILE).touch()
    (left / "model.onnx").write_bytes(b"x")
    with work_folder(parent, store) as held:
        assert sweep_work_folders(parent) == [], "too young to tell"
        assert sweep_work_folders(parent, older_than_s=-1) == [left]
        assert held.path.is_dir()
    assert list(parent.iterdir()) == []
