"""The file as it is: what runs on the device is what was pushed."""

from __future__ import annotations

import shutil
from pathlib import Path

from converters.step import Context, Parameter


def keep(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Copy the source."""
    shutil.copyfile(source, target)
