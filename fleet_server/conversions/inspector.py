"""Checks an uploaded version in a child process, before anything of it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.protocol.manifest import ModelFormat
from converters.job import Inspection, InspectJob, SourceFile, Weights
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import SourceFormat, SourceFormCreate, UploadView, VersionCreate
from fleet_server.catalog.service import InspectionRecord
from fleet_server.conversions.files import work_folder
from fleet_server.conversions.process import Bounds, ConversionFailedError, run_job
from fleet_server.errors import InvalidError
from fleet_server.settings import Settings


class ProcessInspector:
    """`fleet_server.catalog.service.Inspector` by a conversion process."""

    def __init__(self, store: ArtifactStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    def inspect(self, wanted: VersionCreate, keep: Callable[[Path], UploadView]) -> InspectionRecord:
        """Check that files load, agree and fit their data; see `Inspector`.

        Raises:
            InvalidError: naming the field at fault and the remedy.
        """
        bounds = Bounds(
            self._settings.inspect_timeout_s, self._settings.conversion_memory_mb, "SHOAL_INSPECT_TIMEOUT_S"
        )
        with work_folder(self._settings.state_dir / "conversions", self._store) as folder:

            def bring(one: SourceFormCreate) -> str:
                return folder.fetch(one.digest, f".{one.format.value}")

            weights = next((one for one in wanted.sources if one.format is SourceFormat.SAFETENSORS), None)
            forms = [one for one in wanted.sources if one is not weights]
            job = InspectJob(
                sources=tuple(SourceFile(ModelFormat(one.format.value), one.digest, bring(one)) for one in forms),
                calibration=folder.data(wanted.calibration),
                evaluation=folder.data(wanted.evaluation),
                classes=len(wanted.labels) or None,
                weights=Weights(wanted.architecture or "", weights.digest, bring(weights)) if weights else None,
                training=folder.data(wanted.training),
                processing=wanted.processing,
            )
            try:
                found = run_job(job, folder.path, Inspection, bounds)
            except ConversionFailedError as failed:
                error = failed.error
                raise InvalidError(error.code, error.detail, field=error.field or "sources") from None
            exported = {one.format: keep(folder.path / Path(one.path).name) for one in found.exported}
        rest = msgspec.to_builtins(found)
        rest.pop("exported")
        return InspectionRecord(rest.pop("inputs"), rest.pop("outputs"), rest, exported)
