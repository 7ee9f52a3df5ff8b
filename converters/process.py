"""One conversion as a process: `python -m converters.process FOLDER`. Reads job.json, writes result.json or error.json.

Standard output carries progress lines only; whatever libraries print goes to standard error. The process limits its own
memory and ends when its parent does.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

import msgspec

from agent.parent import end_with_parent
from converters.errors import ConversionError
from converters.job import ERROR_FILE, JOB_FILE, RESULT_FILE, Job, JobError, Progress

NICE = 10


def main() -> int:
    """Do the job in the folder; the exit status is 0 with a result and 1 with an error."""
    parser = argparse.ArgumentParser(prog="converters.process", description="Started by the fleet server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory-mb", type=int, default=8192)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args()
    end_with_parent(options.parent)
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_mb << 20, options.memory_mb << 20))
    os.nice(NICE)
    progress_to = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def progress(fraction: float, step: str) -> None:
        progress_to.write(msgspec.json.encode(Progress(fraction, step)) + b"\n")

    folder: Path = options.folder
    try:
        from converters.pipeline import run

        job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=Job)
        _write(folder / RESULT_FILE, msgspec.json.encode(run(job, folder, progress)))
    except ConversionError as error:
        _write(folder / ERROR_FILE, msgspec.json.encode(JobError(error.code, error.detail, error.field)))
        return 1
    except MemoryError:
        detail = f"the conversion needs more than {options.memory_mb} MiB (SHOAL_CONVERSION_MEMORY_MB)"
        _write(folder / ERROR_FILE, msgspec.json.encode(JobError("out_of_memory", detail)))
        return 1
    return 0


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
