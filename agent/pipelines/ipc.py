"""What the supervisor and a pipeline's process tell each other."""

from __future__ import annotations

import msgspec

from agent.pipelines.config import PipelineConfig


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """What to do; the first and only word of the supervisor, whose end of the stream is the end of the process.

    Attributes:
        config: of the pipeline.
        device_id: stands in its events.
        folder: the agent's, for what has to last.
        listen: `host:port` of the inference API.
        unix_socket: of it; empty where it has none.
        hang_s: how long one inference may take; 0: for ever.
        log_level: of the agent.
        log_format: likewise.
    """

    config: PipelineConfig
    device_id: str
    folder: str
    listen: str
    unix_socket: str
    hang_s: float
    log_level: str
    log_format: str = "text"


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """Something does not go on, or went wrong.

    Attributes:
        code: of the problem.
        part: of the pipeline, such as the name of a sink.
        detail: a sentence for people.
        count: how often.
        ongoing: it holds until `Fine`.
    """

    code: str
    part: str
    detail: str
    count: int = 1
    ongoing: bool = True


class Fine(msgspec.Struct, frozen=True, tag="fine"):
    """What was ongoing is no more."""

    code: str
    part: str


FromPipeline = Trouble | Fine
