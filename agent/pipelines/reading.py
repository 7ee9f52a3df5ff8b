"""Reads `[[pipelines]]` of the agent's configuration, by its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.errors import ConfigError
from agent.pipelines.config import (
    AWAY_S,
    OUTBOX_MB,
    REPORT_AFTER_S,
    RETRY_S,
    FileSink,
    FolderSource,
    MqttSink,
    MqttSource,
    Only,
    PipelineConfig,
    Sink,
    Source,
    VideoSource,
    WavSource,
    WebhookSink,
)
from agent.pipelines.values import broker_of, check_path, check_url, choice_of, file_of, is_topic, path_of
from agent.tables import Table

MOST_PIPELINES = 16
MOST_SINKS = 8
LONGEST_S = 86_400.0
LONGEST_RETRY_S = 60.0
MOST_MB = 1 << 20
MOST_LABELS = 1000
MOST_WINDOW = 1 << 24
VIDEO_SCHEMES = ("rtsp", "rtsps", "http", "https")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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
    name = table.identifier("name", "")
    table.name = f"pipelines[{name}]"
    model = table.identifier("model", "")
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
    found = readers[choice_of(table, "kind", "", tuple(readers))](table)
    table.refuse_rest()
    return found


def _folder(table: Table) -> FolderSource:
    then, order = table.text("then", "keep"), choice_of(table, "order", "name", ("name", "time"))
    path = path_of(table, "path")
    target = then.removeprefix("move:") if then.startswith("move:") else ""
    if then not in {"keep", "delete"} and not target.startswith("/"):
        raise ConfigError(f'{table.name}.then: {then[:200]!r} is not "keep", "delete" or "move:/another/folder"')
    if target and Path(target) == Path(path):
        raise ConfigError(f"{table.name}.then: files can't be moved to where they come from: name another folder")
    return FolderSource(path, "move" if target else then, target, order)


def _video(table: Table) -> VideoSource:
    given = table.text("input", "")
    if "://" in given:
        check_url(f"{table.name}.input", given, VIDEO_SCHEMES, "rtsp://10.0.0.9/stream1")
    else:
        check_path(f"{table.name}.input", given, "/data/door.mp4, or rtsp://10.0.0.9/stream1")
    return VideoSource(given, quality=_quality(table))


def _camera(table: Table) -> VideoSource:
    device = table.text("device", "/dev/video0")
    check_path(f"{table.name}.device", device, "/dev/video0")
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
    if not is_topic(topic) or hashes or any("+" in part and part != "+" for part in parts):
        raise ConfigError(f"{table.name}.topic: {topic[:200]!r} is no topic filter, such as cameras/+/jpeg")
    return MqttSource(broker_of(table), topic, file_of(table, "ca_file"), table.amount("away_s", AWAY_S, LONGEST_S))


def _wav(table: Table) -> WavSource:
    window = table.whole("window", 0, MOST_WINDOW)
    carry, constants = table.take("carry", {}), table.take("constants", {})
    if not isinstance(carry, dict) or not all(isinstance(one, str) for one in carry.values()):
        raise ConfigError(f'{table.name}.carry: must be a table of outputs by input, such as {{ state = "stateN" }}')
    if not isinstance(constants, dict) or not all(_numbers(one) for one in constants.values()):
        raise ConfigError(f"{table.name}.constants: must be a table of numbers by input, such as {{ sr = 16000 }}")
    found = WavSource(
        path=path_of(table, "path"),
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
    kind = choice_of(table, "kind", "", tuple(readers))
    found = readers[kind](table, table.identifier("name", kind))
    table.refuse_rest()
    return found


def _to_file(table: Table, name: str) -> FileSink:
    return FileSink(
        name, path_of(table, "path"), max_mb=table.number("max_mb", 16.0, MOST_MB), keep=table.whole("keep", 4, 1000)
    )


def _webhook(table: Table, name: str) -> WebhookSink:
    url, insecure = table.text("url", ""), table.flag("insecure_plain_http")
    check_url(f"{table.name}.url", url, ("https", "http"), "https://ops.example/shoal")
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
        token_file=file_of(table, "token_file"),
        secret_file=file_of(table, "secret_file"),
        ca_file=file_of(table, "ca_file"),
    )


def _mqtt_sink(table: Table, name: str) -> MqttSink:
    topic = table.text("topic", "")
    if not is_topic(topic) or any(sign in topic for sign in "+#") or topic.startswith("$"):
        raise ConfigError(f"{table.name}.topic: {topic[:200]!r} is no topic, such as plant7/door/people")
    away_s = table.number("away_s", AWAY_S, LONGEST_RETRY_S)
    return MqttSink(name, broker_of(table), topic, file_of(table, "ca_file"), away_s)


def _only(table: Table) -> Only:
    labels = tuple(table.texts("labels", MOST_LABELS))
    score = table.take("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ConfigError(f"{table.name}.score: must be a number, such as 0.5")
    found = Only(labels, None if score is None else float(score), table.text("output", "scores"))
    table.refuse_rest()
    return found
