"""What it costs to bring one artifact to many devices at once, beside plain HTTP downloads of the same file.

Fifty agents' download code (`agent.update`, each with a link of its own) in a few processes, Mosquitto, and the
server's gateway, each in its own process. The other side is nginx with as many HTTP clients in as many processes, which
hash and write as well; once as they are, once synced to disk before they count, as an agent's download is. All of it
shares this machine: what is compared are sums of everybody's work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from agent.protocol.messages import ChunkRange, Need
from agent.update.download import EVERY_CHUNKS
from fleet_server.gateway.streamer import Streamer
from tests.benchmarks.common import Checks, await_port, broker, children, cpu_s
from tests.fleet import free_port

CHUNK = 256 * 1024
COUNTED = "$SYS/broker/publish/bytes/received"
NGINX = """\
worker_processes auto;
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 1024; }}
http {{
  sendfile on;
  tcp_nopush on;
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root {folder}/files; }}
}}
"""


class Peer:
    """One of the processes of `delivery_peers`."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.delivery_peers", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(20)


class Counted:
    """What a broker says it was sent, as payload bytes."""

    def __init__(self, port: int) -> None:
        self.value = 0
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.subscribe(COUNTED)
        self._client.loop_start()

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        self.value = int(message.payload)

    def settled(self) -> int:
        """Its count, when it has not changed for two of its reports."""
        time.sleep(2.5)
        return self.value

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def wave(
    kind: str,
    folder: Path,
    port: int,
    content: dict[str, Any],
    shape: tuple[int, int],
    flag: int,
    others: tuple[int, ...] = (),
) -> dict[str, Any]:
    """One round: everybody downloads at once; how long until the last has it, and what it cost."""
    devices, processes = shape
    each = devices // processes
    peers = [
        Peer(kind, folder, port, number * each, each, content["digest"], content["size"], CHUNK, flag)
        for number in range(processes)
    ]
    try:
        for one in peers:
            one.hear()
        os.sync()
        before = [cpu_s(pid) for pid in others]
        started = time.monotonic()
        for one in peers:
            one.go()
        said = [one.hear() for one in peers]
        costs = [cpu_s(pid) - was for pid, was in zip(others, before, strict=True)]
        for one in peers:
            one.go()
            one.process.wait(30)
    finally:
        for one in peers:
            one.end()
        shutil.rmtree(folder)
    failures = [text for one in said for text in one["failures"]]
    if failures:
        raise RuntimeError(f"{len(failures)} downloads failed: {failures[0]}")
    return {
        "others_cpu_s": costs,
        "wall_s": max(one["done_at"] for one in said) - started,
        **{key: sum(one[key] for one in said) for key in ("verified", "cpu_s", "bytes", "need_bytes")},
    }


@contextmanager
def nginx(folder: Path, artifact: Path, digest: str) -> Iterator[tuple[int, int]]:
    """nginx on loopback with the artifact under its digest; its port and pid."""
    executable = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if executable is None:
        raise RuntimeError("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    (folder / "files").mkdir(parents=True)
    shutil.copy(artifact, folder / "files" / digest)
    folder.chmod(0o755)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    process = subprocess.Popen([executable, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        await_port(port, process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few devices and megabytes, to see that it works")
    options = parser.parse_args()
    devices, processes, size, rounds = (6, 2, 2_000_000, 1) if options.short else (50, 10, 20_000_000, 3)
    checks = Checks("delivery")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        artifact = folder / "artifact"
        artifact.write_bytes(random.Random(0).randbytes(size))
        measure(checks, folder, artifact, (devices, processes), rounds)
    decide(checks, ((6, 80),) if options.short else ((50, 80), (1000, 2000), (1000, 16000)))
    checks.print()


def measure(checks: Checks, folder: Path, artifact: Path, shape: tuple[int, int], rounds: int) -> None:
    devices = shape[0]
    (folder / "broker").mkdir()
    with broker(folder / "broker") as (port, broker_pid):
        counted = Counted(port)
        server = Peer("server", folder / "server", port, artifact, devices)
        try:
            content = server.hear()
            size, delivered_mb = content["size"], content["size"] * devices / 1e6
            clean, lossy, plain, durable = [], [], [], []
            with nginx(folder / "nginx", artifact, content["digest"]) as (http_port, nginx_pid):
                for number in range(rounds):
                    was = counted.settled()
                    found = wave("agents", folder / "wave", port, content, shape, 0, (server.process.pid, broker_pid))
                    found["published"] = counted.settled() - was - found["need_bytes"]
                    clean.append(found)
                    # As long a pause before each: memory that was given back to the host is dearer to use again.
                    counted.settled()
                    plain.append(wave("http", folder / "http", http_port, content, shape, 0))
                    counted.settled()
                    durable.append(wave("http", folder / "http", http_port, content, shape, 1))
                    was = counted.settled()
                    found = wave("agents", folder / "wave", port, content, shape, number + 1)
                    found["published"] = counted.settled() - was - found["need_bytes"]
                    lossy.append(found)
                nginx_cpu = sum(map(cpu_s, [nginx_pid, *children(nginx_pid)])) / (2 * rounds)
            resident = peak_mb(broker_pid)
        finally:
            server.end()
            counted.close()
    worst = max(one["published"] for one in clean) / size
    checks.at_most("bytes published, of the artifact's", worst, 1.10)
    seconds = statistics.median(one["wall_s"] for one in clean)
    synced = seconds / statistics.median(one["wall_s"] for one in durable)
    checks.at_most("wall time, of HTTP's", seconds / statistics.median(one["wall_s"] for one in plain), 1.2)
    checks.report("wall time, of HTTP's with files synced, as an agent's are", synced)
    checks.report("wall time, s", seconds)
    checks.report("wall time of HTTP, s", statistics.median(one["wall_s"] for one in plain))
    checks.report("wall time of HTTP with files synced, s", statistics.median(one["wall_s"] for one in durable))
    checks.at_least("devices that verified it", min(one["verified"] for one in clean), devices)
    worst = max(one["published"] for one in lossy) / size
    checks.at_most("2 % lost, 10 % doubled or late: bytes published", worst, 1.25)
    checks.at_least(
        "2 % lost, 10 % doubled or late: devices that verified it", min(one["verified"] for one in lossy), devices
    )
    checks.report("2 % lost, 10 % doubled or late: wall time, s", statistics.median(one["wall_s"] for one in lossy))
    parts = {
        "server": statistics.median(one["others_cpu_s"][0] for one in clean),
        "broker": statistics.median(one["others_cpu_s"][1] for one in clean),
        "clients": statistics.median(one["cpu_s"] for one in clean),
        "HTTP clients": statistics.median(one["cpu_s"] for one in plain),
        "nginx": nginx_cpu,
    }
    for name, used in parts.items():
        checks.report(f"CPU ms a delivered MB: {name}", used * 1000 / delivered_mb)
    checks.report("most memory of the broker, MiB", resident)


def decide(checks: Checks, shapes: tuple[tuple[int, int], ...]) -> None:
    """What the streamer's decisions cost, by listeners and chunks."""
    for listeners, chunks in shapes:
        deciding, hearing = streamer_us(listeners, chunks)
        checks.report(f"{listeners} listeners, {chunks} chunks: CPU us a chunk to decide", deciding)
        checks.report(f"{listeners} listeners, {chunks} chunks: CPU us a need to hear", hearing)


def streamer_us(listeners: int, chunks: int) -> tuple[float, float]:
    """Microseconds that the streamer takes to decide about a chunk, and to take in a need, in a wave without losses."""
    streamer, digest, now, sent, said = Streamer(), "a" * 64, 1.0, 0, 0
    deciding = hearing = 0.0
    needs = 0
    for number in range(listeners):
        streamer.hear(str(number), Need(digest, "d", (ChunkRange(0, chunks - 1),)), 0.0)
    while sent < chunks:
        before = time.process_time()
        sent += len(list(streamer.next(now, 64)))
        deciding += time.process_time() - before
        before = time.process_time()
        while sent - said >= EVERY_CHUNKS:
            said += EVERY_CHUNKS
            missing = (ChunkRange(said, chunks - 1),) if said < chunks else ()
            for number in range(listeners):
                streamer.hear(str(number), Need(digest, "d", missing), now)
            needs += listeners
        hearing += time.process_time() - before
        now += 0.02
    return deciding / chunks * 1e6, hearing / needs * 1e6


def peak_mb(pid: int) -> float:
    """The most that a process ever had in memory, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
