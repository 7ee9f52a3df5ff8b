"""Cuts a version into stages in a child process: its file was made by a stranger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.protocol.manifest import ModelFormat
from agent.protocol.processing import Processing
from converters.job import ShardDevice, Sharding, ShardJob, SourceFile
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.conversions.files import work_folder
from fleet_server.conversions.process import Bounds, ConversionFailedError, run_job
from fleet_server.domain.sharding import Capacity
from fleet_server.errors import InvalidError
from fleet_server.settings import Settings


@dataclass(frozen=True)
class CutOrder:
    """What is cut, and for whom.

    Attributes:
        digest: of the version's ONNX form.
        devices: to choose from.
        stages: how many; None for the fewest that fit.
        rows: of a micro-batch.
        calibration: digest of the data set; None for none.
        evaluation: likewise.
        processing: of the version.
    """

    digest: str
    devices: Sequence[Capacity]
    stages: int | None
    rows: int
    calibration: str | None
    evaluation: str | None
    processing: Processing | None


class ProcessSharder:
    """Cuts in a conversion process, within the bounds of an inspection."""

    def __init__(self, store: ArtifactStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    def cut(self, order: CutOrder, keep: Callable[[Path], object]) -> Sharding:
        """Cut a version.

        Args:
            order: what and for whom.
            keep: takes every file that was made, while it is there.

        Raises:
            InvalidError: naming the field at fault and the remedy.
        """
        settings = self._settings
        bounds = Bounds(settings.inspect_timeout_s, settings.conversion_memory_mb, "SHOAL_INSPECT_TIMEOUT_S")
        with work_folder(settings.state_dir / "conversions", self._store) as folder:
            job = ShardJob(
                source=SourceFile(ModelFormat.ONNX, order.digest, folder.fetch(order.digest, ".onnx")),
                devices=tuple(ShardDevice(one.device, one.memory, one.speed, one.bytes_per_s) for one in order.devices),
                stages=order.stages,
                rows=order.rows,
                calibration=folder.data(order.calibration),
                evaluation=folder.data(order.evaluation),
                processing=order.processing,
            )
            try:
                found = run_job(job, folder.path, Sharding, bounds)
            except ConversionFailedError as failed:
                error = failed.error
                raise InvalidError(error.code, error.detail, field=error.field or "version") from None
            for stage in found.stages:
                for path in (stage.path, *(one.path for one in (stage.evaluation, stage.calibration) if one)):
                    keep(folder.path / Path(path).name)
        return found
