"""Checks an uploaded version in a child process, before anything of it is written."""

from __future__ import annotations

import msgspec

from converters.job import Inspection, InspectJob, SourceFile
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import VersionCreate
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

    def inspect(self, wanted: VersionCreate) -> InspectionRecord:
        """Check that files load, agree and fit their data.

        Raises:
            InvalidError: naming the field at fault and the remedy.
        """
        bounds = Bounds(self._settings.inspect_timeout_s, self._settings.conversion_memory_mb)
        with work_folder(self._settings.state_dir / "conversions", self._store) as folder:
            job = InspectJob(
                sources=tuple(
                    SourceFile(source.format, source.digest, folder.fetch(source.digest, f".{source.format.value}"))
                    for source in wanted.sources
                ),
                calibration=folder.data(wanted.calibration),
                evaluation=folder.data(wanted.evaluation),
                classes=len(wanted.labels) or None,
            )
            try:
                found = run_job(job, folder.path, Inspection, bounds)
            except ConversionFailedError as failed:
                error = failed.error
                raise InvalidError(error.code, error.detail, field=error.field or "sources") from None
        rest = msgspec.to_builtins(found)
        return InspectionRecord(inputs=rest.pop("inputs"), outputs=rest.pop("outputs"), inspection=rest)
