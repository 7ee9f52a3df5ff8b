"""SHA-256 of files, and source files with theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from agent.protocol.manifest import ModelFormat
from converters.job import SourceFile


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(forms: Mapping[ModelFormat, Path]) -> tuple[SourceFile, ...]:
    """Files by format as a job names them."""
    return tuple(SourceFile(form, file_digest(path), str(path.absolute())) for form, path in forms.items())
