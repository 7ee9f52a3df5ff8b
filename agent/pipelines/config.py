"""`[[pipelines]]` of the agent's configuration: what is declared, and its rules. Pure, but for whether files are there.

The parts are structs, as they are also what a pipeline's process is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from agent.errors import ConfigError
from agent.protocol.topics import check_device_id
from agent.tables import Table

MOST_PIPELINES = 16
MOST_SINKS = 8
LONGEST_S = 86_400.0
OUTBOX_MB = 64.0
RETRY_S = 1.0
REPORT_AFTER_S = 2.0
AWAY_S = 10.0
LONGEST_RETRY_S = 60.0
MOST_MB = 1 << 20
MOST_LABELS = 1000
LONGEST_URL = 2000
MOST_WINDOW = 1 << 24
VIDEO_SCHEMES = ("rtsp", "rtsps", "http", "https")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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


def read_pipelines(values: Any) -> tuple[PipelineConfig, ...]:
    """Read the array of tables.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if not isinstance(values, list) or len(values) > MOST_PIPELINES:
        raise ConfigError(f"pipelines: must be at most {MOST_PIPELINES} tables, each begun by [[pipelines]]")
    found = tuple(_pipeline(number, one) for number, one in enumerate(values))
    for name in (names := [one.name for one in found]):
        if names.count(name) > 1:
            raise ConfigError(f"pipelines[{name}].name: there are two of it; give each its own")
    files = [sink.path for one in found for sink in one.sinks if isinstance(sink, FileSink)]
    for path in files:
        if files.count(path) > 1:
            raise ConfigError(f"pipelines: two sinks write to {path!r}; give each its own file")
    return found


def _pipeline(number: int, values: Any) -> PipelineConfig:
    table = Table(f"pipelines[{number}]", values)
    name = _name(table, "name", "")
    table.name = f"pipelines[{name}]"
    model = _name(table, "model", "")
    source = _source(Table(f"{table.name}.source", table.take("source", {})))
    given = table.take("sinks", [])
    if not isinstance(given, list) or not 0 < len(given) <= MOST_SINKS:
        raise ConfigError(f"{table.name}.sinks: must be 1 to {MOST_SINKS} tables, each begun by [[pipelines.sinks]]")
    sinks = tuple(_sink(Table(f"{table.name}.sinks[{index}]", one)) for index, one in enumerate(given))
    for one in (names := [sink.name for sink in sinks]):
        if names.count(one) > 1:
            raise ConfigError(f"{table.name}.sinks: two are named {one!r}; give them names of their own (name)")
    found = PipelineConfig(
        name=name,
        model=model,
        source=source,
        sinks=sinks,
        every_s=table.amount("every_s", 0.0, LONGEST_S),
        only=_only(Table(f"{table.name}.only", table.take("only", {}))),
        outbox_mb=table.number("outbox_mb", OUTBOX_MB, MOST_MB),
        retry_s=table.number("retry_s", RETRY_S, LONGEST_RETRY_S),
        report_after_s=table.amount("report_after_s", REPORT_AFTER_S, LONGEST_S),
    )
    table.refuse_rest()
    if found.every_s and isinstance(source, WavSource):
        raise ConfigError(f"{table.name}.every_s: sound is taken window by window: set `hop` of its source")
    return found


def _source(table: Table) -> Source:
    readers: Mapping[str, Callable[[Table], Source]] = {
        "folder": _folder,
        "video": _video,
        "camera": _camera,
        "mqtt": _mqtt_source,
        "wav": _wav,
    }
    found = readers[_choice(table, "kind", "", tuple(readers))](table)
    table.refuse_rest()
    return found


def _folder(table: Table) -> FolderSource:
    then, order = table.text("then", "keep"), _choice(table, "order", "name", ("name", "time"))
    path = _path(table, "path")
    target = then.removeprefix("move:") if then.startswith("move:") else ""
    if then not in {"keep", "delete"} and not target.startswith("/"):
        raise ConfigError(f'{table.name}.then: {then[:200]!r} is not "keep", "delete" or "move:/another/folder"')
    if target and Path(target) == Path(path):
        raise ConfigError(f"{table.name}.then: files can't be moved to where they come from: name another folder")
    return FolderSource(path, "move" if target else then, target, order)


def _video(table: Table) -> VideoSource:
    given = table.text("input", "")
    if "://" in given:
        _check_url(f"{table.name}.input", given, VIDEO_SCHEMES, "rtsp://10.0.0.9/stream1")
    else:
        _check_path(f"{table.name}.input", given, "/data/door.mp4, or rtsp://10.0.0.9/stream1")
    return VideoSource(given, quality=_quality(table))


def _camera(table: Table) -> VideoSource:
    device = table.text("device", "/dev/video0")
    _check_path(f"{table.name}.device", device, "/dev/video0")
    size = table.text("size", "")
    width, _, height = size.partition("x")
    if size and not all(one.isascii() and one.isdigit() and 0 < int(one[:9]) <= 16384 for one in (width, height)):
        raise ConfigError(f"{table.name}.size: {size[:40]!r} is not like 1280x720")
    return VideoSource(device, camera=True, size=size, quality=_quality(table))


def _quality(table: Table) -> int:
    return max(table.whole("quality", 3, 31), 2)


def _mqtt_source(table: Table) -> MqttSource:
    topic = table.text("topic", "")
    parts = topic.split("/")
    hashes = "#" in topic and (topic.count("#") > 1 or parts[-1] != "#")
    if not _is_topic(topic) or hashes or any("+" in part and part != "+" for part in parts):
        raise ConfigError(f"{table.name}.topic: {topic[:200]!r} is no topic filter, such as cameras/+/jpeg")
    return MqttSource(_broker(table), topic, _file(table, "ca_file"), table.amount("away_s", AWAY_S, LONGEST_S))


def _wav(table: Table) -> WavSource:
    window = table.whole("window", 0, MOST_WINDOW)
    carry, constants = table.take("carry", {}), table.take("constants", {})
    if not isinstance(carry, dict) or not all(isinstance(one, str) for one in carry.values()):
        raise ConfigError(f'{table.name}.carry: must be a table of outputs by input, such as {{ state = "stateN" }}')
    if not isinstance(constants, dict) or not all(_numbers(one) for one in constants.values()):
        raise ConfigError(f"{table.name}.constants: must be a table of numbers by input, such as {{ sr = 16000 }}")
    found = WavSource(
        path=_path(table, "path"),
        input=table.text("input", "") or "input",
        window=window,
        hop=table.whole("hop", window, window),
        rate=table.whole("rate", 16_000, 1_000_000),
        carry=carry,
        constants=constants,
    )
    for one in (names := [found.input, *carry, *constants]):
        if names.count(one) > 1:
            raise ConfigError(f"{table.name}: the input {one!r} is given twice, by input, carry or constants")
    return found


def _numbers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= 4096 and all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _sink(table: Table) -> Sink:
    readers: Mapping[str, Callable[[Table, str], Sink]] = {"file": _to_file, "webhook": _webhook, "mqtt": _mqtt_sink}
    kind = _choice(table, "kind", "", tuple(readers))
    found = readers[kind](table, _name(table, "name", kind))
    table.refuse_rest()
    return found


def _to_file(table: Table, name: str) -> FileSink:
    return FileSink(
        name, _path(table, "path"), max_mb=table.number("max_mb", 16.0, MOST_MB), keep=table.whole("keep", 4, 1000)
    )


def _webhook(table: Table, name: str) -> WebhookSink:
    url, insecure = table.text("url", ""), table.flag("insecure_plain_http")
    _check_url(f"{table.name}.url", url, ("https", "http"), "https://ops.example/shoal")
    parts = urlsplit(url)
    if parts.scheme == "http" and not insecure and parts.hostname not in LOOPBACK:
        raise ConfigError(
            f"{table.name}.url: it goes over http:// beyond this machine: use https://, or set insecure_plain_http"
        )
    if parts.username is not None or parts.fragment:
        raise ConfigError(f"{table.name}.url: it may hold no user, password or fragment: use token_file")
    return WebhookSink(
        name,
        url,
        batch=table.whole("batch", 1, 100),
        token_file=_file(table, "token_file"),
        secret_file=_file(table, "secret_file"),
        ca_file=_file(table, "ca_file"),
    )


def _mqtt_sink(table: Table, name: str) -> MqttSink:
    topic = table.text("topic", "")
    if not _is_topic(topic) or any(sign in topic for sign in "+#") or topic.startswith("$"):
        raise ConfigError(f"{table.name}.topic: {topic[:200]!r} is no topic, such as plant7/door/people")
    away_s = table.number("away_s", AWAY_S, LONGEST_RETRY_S)
    return MqttSink(name, _broker(table), topic, _file(table, "ca_file"), away_s)


def _only(table: Table) -> Only:
    labels = tuple(table.texts("labels", MOST_LABELS))
    score = table.take("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ConfigError(f"{table.name}.score: must be a number, such as 0.5")
    found = Only(labels, None if score is None else float(score), table.text("output", "scores"))
    table.refuse_rest()
    return found


def _choice(table: Table, key: str, default: str, known: Sequence[str]) -> str:
    value = table.text(key, default)
    if value not in known:
        raise ConfigError(f"{table.name}.{key}: {value[:64]!r} is not one of {', '.join(known)}")
    return value


def _name(table: Table, key: str, default: str) -> str:
    value = table.text(key, default)
    try:
        return check_device_id(value)  # the same characters: it stands in paths
    except ValueError:
        raise ConfigError(
            f"{table.name}.{key}: {value[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'"
        ) from None


def _path(table: Table, key: str) -> str:
    value = table.text(key, "")
    _check_path(f"{table.name}.{key}", value, "/var/spool/camera")
    return value


def _check_path(key: str, value: str, example: str) -> None:
    if not value.startswith("/") or "\0" in value or len(value) > LONGEST_URL:
        raise ConfigError(f"{key}: {value[:200]!r} is no absolute path, such as {example}")


def _file(table: Table, key: str) -> str:
    value = table.text(key, "")
    if value and not os.access(value, os.R_OK):
        raise ConfigError(f"{table.name}.{key}: {value[:200]!r} can't be read: name a file that can, or leave it out")
    return value


def _broker(table: Table) -> str:
    url = table.text("url", "")
    _check_url(f"{table.name}.url", url, ("mqtt", "mqtts"), "mqtt://10.0.0.5:1883")
    return url


def _check_url(key: str, value: str, schemes: tuple[str, ...], example: str) -> None:
    """The URL is not repeated in errors: it may hold a password."""
    try:
        parts = urlsplit(value)
        fits = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not value.isascii() or not value.isprintable() or " " in value or len(value) > LONGEST_URL:
        raise ConfigError(f"{key}: this is no {':// or '.join(schemes)}:// address, such as {example}")


def _is_topic(topic: str) -> bool:
    return 0 < len(topic.encode()) <= 1024 and topic.isprintable()
