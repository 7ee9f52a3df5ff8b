"""What the supervisor's process and the measuring one say to each other, by files in a folder."""

from __future__ import annotations

import msgspec

from agent.protocol.manifest import Manifest

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
ANSWERS_FILE = "answers.npy"  # of the reference, for the candidates after it


class MeasureJob(msgspec.Struct, frozen=True):
    """One candidate to measure.

    Attributes:
        manifest: of the candidate.
        path: of its artifact.
        data: path of the evaluation set.
        is_reference: whether its answers are kept for the candidates after it.
        reference: to be timed in turns with; None where there is none.
        reference_path: of its artifact.
    """

    manifest: Manifest
    path: str
    data: str
    is_reference: bool
    reference: Manifest | None = None
    reference_path: str = ""
