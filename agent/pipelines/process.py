"""The process of one pipeline: takes its order on an inherited socket, and ends when the supervisor's end closes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agent.children import inherited_socket
from agent.database import DatabaseError
from agent.pipelines.client import Client
from agent.pipelines.config import (
    FileSink,
    FolderSource,
    MqttSource,
    PipelineConfig,
    VideoSource,
    WebhookSink,
)
from agent.pipelines.config import (
    Sink as SinkConfig,
)
from agent.pipelines.health import Health
from agent.pipelines.ipc import Begin, Trouble
from agent.pipelines.items import Source
from agent.pipelines.outbox import Outbox
from agent.pipelines.runner import Runner
from agent.pipelines.sinks.sink import Sender, Sink
from agent.problems import PIPELINE_DROPPED, PIPELINE_FAILED
from agent.protocol.logs import log_to_stderr
from agent.serving.framing import FrameChannel

STOP_S = 3.0


def main() -> None:
    """Run until the stream ends."""
    channel = FrameChannel(inherited_socket(), Begin)
    order = channel.receive()
    if not isinstance(order, Begin):
        return
    log_to_stderr(order.log_level, order.log_format, device=order.device_id)
    status = run(order, channel)
    os._exit(status)  # a source may wait in a read that nothing ends, and all that lasts is written


def run(order: Begin, channel: FrameChannel) -> int:
    """The exit status."""
    config = order.config
    health = Health(channel.send, config.report_after_s)
    path = Path(order.folder) / f"{config.name}.db"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        outbox = Outbox(path, [one.name for one in config.sinks], int(config.outbox_mb * 2**20))
    except (OSError, DatabaseError) as error:
        channel.send(Trouble(PIPELINE_FAILED, "disk", f"{path} can't be written: {error}"))
        return 1
    if outbox.unwritable:  # a file would be taken, and its result be lost with the power
        channel.send(Trouble(PIPELINE_FAILED, "disk", outbox.unwritable))
        return 1
    if outbox.lost:
        health.trouble(PIPELINE_DROPPED, "outbox", outbox.lost, ongoing=False)
    client = Client(order.listen, order.unix_socket, config.model, order.hang_s)
    source = open_source(config, order.device_id, client, outbox, health)
    senders = [
        Sender(one.name, open_sink(one, config, order.device_id), outbox, health, config.retry_s)
        for one in config.sinks
    ]
    runner = Runner(config, order.device_id, source, client, outbox, health)
    failed = threading.Event()
    working = threading.Thread(target=_watched, args=(runner, channel, failed), daemon=True)
    working.start()
    channel.receive()  # nothing but its end comes
    runner.stop()
    for sender in senders:
        sender.stop()
    outbox.wake()
    working.join(STOP_S)
    for sender in senders:
        sender.join(STOP_S)
    source.close()
    return int(failed.is_set())


def _watched(runner: Runner, channel: FrameChannel, failed: threading.Event) -> None:
    """A fault of our own ends the process: it is started again."""
    try:
        runner.run()
    except BaseException:
        failed.set()
        channel.shut()
        raise


def open_source(config: PipelineConfig, device_id: str, client: Client, outbox: Outbox, health: Health) -> Source:
    """The source that is declared; its library is loaded by the process that needs it."""
    declared = config.source
    if isinstance(declared, FolderSource):
        from agent.pipelines.sources.folder import Folder

        return Folder(declared, outbox.progress(), outbox.forget)
    if isinstance(declared, VideoSource):
        from agent.pipelines.sources.video import KEY, Video

        return Video(declared, config.every_s, outbox.progress().get(KEY, ""))
    if isinstance(declared, MqttSource):
        from agent.pipelines.sources.mqtt import Mqtt

        def dropped(count: int) -> None:
            detail = "messages were dropped, the oldest first: they come faster than they are answered; set every_s"
            health.trouble(PIPELINE_DROPPED, "source", detail, count=count, ongoing=False)

        return Mqtt(declared, f"{device_id}/{config.name}/source", dropped, newest=config.every_s > 0)
    from agent.pipelines.sources.wav import KEY as WAV_KEY
    from agent.pipelines.sources.wav import Wav

    return Wav(declared, client.describe, outbox.progress().get(WAV_KEY, ""))


def open_sink(declared: SinkConfig, config: PipelineConfig, device_id: str) -> Sink:
    """The sink that is declared."""
    if isinstance(declared, FileSink):
        from agent.pipelines.sinks.file import File

        return File(declared)
    if isinstance(declared, WebhookSink):
        from agent.pipelines.sinks.webhook import Webhook

        return Webhook(declared)
    from agent.pipelines.sinks.mqtt import Mqtt

    return Mqtt(declared, f"{device_id}/{config.name}/{declared.name}")


if __name__ == "__main__":
    main()
