"""What `[[pipelines]]` of the agent's configuration declare: structs, which a pipeline's process is told, too."""

from __future__ import annotations

import msgspec

OUTBOX_MB = 64.0
RETRY_S = 1.0
REPORT_AFTER_S = 2.0
AWAY_S = 10.0


class FolderSource(msgspec.Struct, frozen=True, tag="folder"):
    """Files that appear in a folder.

    Attributes:
        path: of the folder.
        then: what becomes of a file whose answer is kept: `keep`, `delete`, or `move`.
        move_to: a folder of the same file system.
        order: which of several is first: by `name` or `time`.
    """

    path: str
    then: str = "keep"
    move_to: str = ""
    order: str = "name"


class VideoSource(msgspec.Struct, frozen=True, tag="video"):
    """Frames of a camera, a stream or a file, by ffmpeg.

    Attributes:
        input: an absolute path, or a URL.
        camera: it is a V4L2 device.
        size: `WIDTHxHEIGHT` that a camera is asked for; empty for its own.
        quality: of the JPEG frames, from 2 (best) to 31.
    """

    input: str
    camera: bool = False
    size: str = ""
    quality: int = 3

    @property
    def live(self) -> bool:
        """Whether it goes on by itself, and only the newest frame is worth an answer."""
        return self.camera or "://" in self.input


class MqttSource(msgspec.Struct, frozen=True, tag="mqtt"):
    """Messages of a broker: images, or bodies of the inference protocol.

    Attributes:
        url: `mqtt://[user:password@]host:port` or `mqtts://…`.
        topic: filter of what is taken.
        ca_file: certificates that the broker's is checked against; empty for the system's.
        away_s: seconds without a connection, of fewer nothing is said.
    """

    url: str
    topic: str
    ca_file: str = ""
    away_s: float = AWAY_S


class WavSource(msgspec.Struct, frozen=True, tag="wav"):
    """Windows of samples, mono float32 from -1 to 1.

    Attributes:
        path: of a WAV file, or of a FIFO that one is written to.
        input: the model's input that takes them.
        window: how many samples at once.
        hop: by how many samples the next window is later.
        rate: samples a second, which the stream must have.
        carry: by input, the output that gives its next value.
        constants: by input, numbers that are always the same.
    """

    path: str
    input: str
    window: int
    hop: int
    rate: int
    carry: dict[str, str] = {}
    constants: dict[str, float | list[float]] = {}


class FileSink(msgspec.Struct, frozen=True, tag="file"):
    """JSON lines.

    Attributes:
        name: of the sink.
        path: of the file.
        max_mb: when it has so many MiB, another is begun.
        keep: how many earlier ones stay, as `path.1`, `path.2`, ….
    """

    name: str
    path: str
    max_mb: float = 16.0
    keep: int = 4


class WebhookSink(msgspec.Struct, frozen=True, tag="webhook"):
    """POST requests.

    Attributes:
        name: of the sink.
        url: that takes them.
        batch: how many events at most in one.
        token_file: holds a bearer token; empty for none.
        secret_file: holds a secret (`whsec_…`) that signs; empty for none.
        ca_file: certificates that the receiver's is checked against; empty for the system's.
    """

    name: str
    url: str
    batch: int = 1
    token_file: str = ""
    secret_file: str = ""
    ca_file: str = ""


class MqttSink(msgspec.Struct, frozen=True, tag="mqtt"):
    """Messages to a broker, at QoS 1.

    Attributes:
        name: of the sink.
        url: of the broker.
        topic: to publish on.
        ca_file: as a source's.
        away_s: seconds without a connection or an acknowledgement, after which it has failed.
    """

    name: str
    url: str
    topic: str
    ca_file: str = ""
    away_s: float = AWAY_S


Source = FolderSource | VideoSource | MqttSource | WavSource
Sink = FileSink | WebhookSink | MqttSink


class Only(msgspec.Struct, frozen=True):
    """Which answers are published.

    Attributes:
        labels: one of them must be found; empty for any.
        score: it, or anything, must have so much at least; None for any.
        output: whose numbers are scores.
    """

    labels: tuple[str, ...] = ()
    score: float | None = None
    output: str = "scores"


class PipelineConfig(msgspec.Struct, frozen=True):
    """One pipeline.

    Attributes:
        name: of it, unlike any other's here.
        model: that answers.
        source: of items.
        sinks: of results; at least one.
        every_s: at most one item in so many seconds; 0 for all.
        only: which answers are published.
        outbox_mb: MiB of results that may wait for their sinks.
        retry_s: seconds until a sink that took nothing is asked again; each time twice as many, up to a minute.
        report_after_s: seconds that something goes wrong before it is a problem of the device.
    """

    name: str
    model: str
    source: Source
    sinks: tuple[Sink, ...]
    every_s: float = 0.0
    only: Only = Only()
    outbox_mb: float = OUTBOX_MB
    retry_s: float = RETRY_S
    report_after_s: float = REPORT_AFTER_S
