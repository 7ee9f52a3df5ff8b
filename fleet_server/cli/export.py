"""`shoal export`: variants for where people outgrow devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet_server.cli.output import client, errors, fail
from fleet_server.sdk.errors import ExportError
from fleet_server.sdk.exporting import STORAGE, ExportFormat
from fleet_server.sdk.exporting import export as write


def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The model.")],
    version: Annotated[str, typer.Argument(help="Its version.")],
    output: Annotated[Path, typer.Option(help="Folder that gets one named as the model.")],
    kind: Annotated[ExportFormat, typer.Option("--format", help="For which server of models.")] = ExportFormat.TRITON,
    profile: Annotated[str | None, typer.Option(help="Whose variant, where there are several.")] = None,
    storage: Annotated[str, typer.Option(help="For KServe: URI that the output folder is put at.")] = STORAGE,
) -> None:
    """Write a variant as a model repository of Triton, or an InferenceService.

    The artifact is the one that devices run, checked by its digest. For KServe the repository lies below `models`.

    Example: shoal export mnist 2 --format triton --output repository
    """
    with client(context) as api:
        try:
            place = write(api, name, version, kind, output, profile=profile, storage=storage)
        except (ExportError, OSError) as error:
            raise fail(str(error)) from None
    errors.print(f"{place} is there", markup=False)
