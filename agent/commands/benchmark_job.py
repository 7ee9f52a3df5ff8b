"""What the supervisor's process and the benchmarking one say to each other, by files in a folder."""

from __future__ import annotations

import msgspec

from agent.protocol.manifest import Manifest

JOB_FILE = "job.json"
RESULT_FILE = "result.json"


class BenchmarkJob(msgspec.Struct, frozen=True):
    """One model to benchmark.

    Attributes:
        manifest: of its artifact.
        path: of its artifact.
        golden_path: of its golden inputs; empty where there are none here.
        seconds: how long it is run.
    """

    manifest: Manifest
    path: str
    golden_path: str
    seconds: float
