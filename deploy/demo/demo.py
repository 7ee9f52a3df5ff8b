"""The main job in one command: train, convert per profile, gate, roll out, infer on the devices, and judge.

Drives the same `shoal` command and local inference API that users have. Every figure of the closing table is read back
from the server. Exit status 0 only if everything held.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.demo.classify import classify
from deploy.demo.data import load_mnist, to_images
from deploy.demo.train import break_weights, train

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".demo"
ADMIN_TOKEN = HOME / "server" / "admin-token"
IMAGES = 2000
BIN = Path(sys.executable).parent
console = Console()


@dataclass(frozen=True)
class DemoDevice:
    """One agent of the demo: a device of its own kind on this machine."""

    name: str
    profile: str
    spec: dict[str, Any]
    port: int


class DemoError(Exception):
    """Something that had to hold did not."""


def free_port() -> int:
    """A TCP port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_devices() -> list[DemoDevice]:
    """The three kinds of device: ONNX Runtime fp32, ONNX Runtime int8, LiteRT int8."""
    kinds = [
        ("gateway-01", "onnx-cpu-fp32", "onnx", "fp32", "gateway"),
        ("camera-01", "onnx-cpu-int8", "onnx", "int8", "camera"),
        ("sensor-01", "litert-int8", "litert", "int8", "sensor"),
    ]
    return [
        DemoDevice(
            name=name,
            profile=profile,
            spec={
                "name": profile,
                "match": {"tags.kind": kind},
                "runtime": runtime,
                "providers": ["cpu"],
                "precisions": [precision],
                "budgets": {"accuracy_drop_points": 0.5},
            },
            port=free_port(),
        )
        for name, profile, runtime, precision, kind in kinds
    ]


class Shoal:
    """Runs `shoal` commands against the demo's server, and shows them."""

    def __init__(self, url: str, token: str) -> None:
        self._environment = {**os.environ, "SHOAL_URL": url, "SHOAL_TOKEN": token}

    def __call__(self, *arguments: str, expect: int = 0, stdin: str | None = None) -> Any:
        """Run a command with `-o json`.

        Returns:
            What it printed, decoded; None where it printed nothing.

        Raises:
            DemoError: when its exit status is not `expect`.
        """
        console.print(f"[dim]$ shoal {' '.join(arguments)}[/dim]", highlight=False, soft_wrap=True)
        done = subprocess.run(
            [str(BIN / "shoal"), *arguments, "-o", "json"],
            env=self._environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if expect else None,
            text=True,
            check=False,
            cwd=ROOT,
        )
        if done.returncode != expect:
            raise DemoError(f"`shoal {' '.join(arguments)}` ended with {done.returncode}, not {expect}: {done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else None


class Processes:
    """The server and the agents, as processes of their own."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        """Start one; its output goes to a log file."""
        log = (HOME / "logs" / f"{name}.log").open("wb")
        self._children.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                cwd=ROOT,
            )
        )

    def stop(self) -> None:
        """End all: agents first, asked politely, then not."""
        for child in reversed(self._children):
            child.terminate()
        for child in reversed(self._children):
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    @property
    def pids(self) -> list[int]:
        """Of everything that was started."""
        return [child.pid for child in self._children]

    def check(self) -> None:
        """Raise when one has ended by itself."""
        for child in self._children:
            if child.poll() is not None:
                raise DemoError(f"{child.args!r} ended with {child.returncode}; see {HOME / 'logs'}")


def wait_for(what: str, seconds: float, condition: Any) -> Any:
    """Poll until `condition()` is truthy, and return that.

    Raises:
        DemoError: when it takes longer than `seconds`.
    """
    deadline = time.monotonic() + seconds
    with console.status(f"waiting for {what}"):
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.5)
    raise DemoError(f"waited {seconds:.0f} s for {what}")


def prepare_files(data: dict[str, np.ndarray]) -> None:
    """Write weights, data sets and labels to `.demo/files`."""
    files = HOME / "files"
    files.mkdir(parents=True, exist_ok=True)
    console.rule("train on MNIST")
    started = time.monotonic()
    accuracy = train(data, files / "weights.safetensors")
    console.print(f"trained in {time.monotonic() - started:.0f} s, validation accuracy {accuracy:.2%}")
    break_weights(files / "weights.safetensors", files / "broken.safetensors")
    np.savez(files / "calibration.npz", x=to_images(data["train_x"][:512]))
    np.savez(files / "evaluation.npz", x=to_images(data["valid_x"][:4000]), y=data["valid_y"][:4000])
    (files / "labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))


def start_all(processes: Processes, devices: list[DemoDevice]) -> str:
    """Start the server (with its own broker) and the agents; return the URL of the API."""
    port, broker_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    processes.start(
        "server",
        str(BIN / "shoal-server"),
        environment={
            "SHOAL_STATE_DIR": str(HOME / "server"),
            "SHOAL_PORT": str(port),
            "SHOAL_BROKER_PORT": str(broker_port),
            "SHOAL_TELEMETRY_INTERVAL_S": "2",
            "SHOAL_PROBATION_S": "2",
        },
    )
    for device in devices:
        config = HOME / f"{device.name}.toml"
        kind = device.spec["match"]["tags.kind"]
        config.write_text(
            f'device_id = "{device.name}"\n'
            f'state_dir = "{HOME / device.name}"\n'
            f'broker = "mqtt://127.0.0.1:{broker_port}"\n'
            f'listen = "127.0.0.1:{device.port}"\n'
            f'runtimes = ["{device.spec["runtime"]}"]\n'
            f'tags = {{ kind = "{kind}" }}\n'
        )
        processes.start(device.name, str(BIN / "shoal-agent"), "run", "--config", str(config))
    return url


def push(shoal: Shoal, reference: str, weights: str) -> None:
    """`shoal model push`, with the data sets of the demo."""
    shoal(
        *("model", "push", reference, "deploy/demo/net.py:build", "--weights", f".demo/files/{weights}"),
        *("--calibration", ".demo/files/calibration.npz", "--evaluation", ".demo/files/evaluation.npz"),
        *("--labels", ".demo/files/labels.txt"),
    )


def measure(shoal: Shoal, devices: list[DemoDevice], data: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Classify the test images on each device, then wait until the server has heard of every one."""
    images, labels = to_images(data["test_x"][:IMAGES]), data["test_y"][:IMAGES]
    for device in devices:
        with console.status(f"{device.name} classifies {IMAGES} images"):
            classify(f"http://127.0.0.1:{device.port}", "mnist", images, labels)
        console.print(f"{device.name} answered {IMAGES} requests through its local API")

    def heard() -> list[dict[str, Any]] | None:
        rows = shoal_quiet(shoal, "telemetry", "models", "--model", "mnist", "--version", "1")
        mine = [row for row in rows if row["device_id"] in {device.name for device in devices}]
        return mine if len(mine) == len(devices) and all(row["labelled"] >= IMAGES for row in mine) else None

    rows: list[dict[str, Any]] = wait_for("the devices' telemetry", 60, heard)
    return rows


def shoal_quiet(shoal: Shoal, *arguments: str) -> list[dict[str, Any]]:
    """A command that is polled: not shown each time."""
    console.quiet = True
    try:
        answer = shoal(*arguments)
    finally:
        console.quiet = False
    return items(answer)


def items(answer: Any) -> list[dict[str, Any]]:
    """The rows of a list, paged or not."""
    rows: list[dict[str, Any]] = answer["items"] if isinstance(answer, dict) and "items" in answer else answer
    return rows


def show(shoal: Shoal, rows: list[dict[str, Any]], rollout: str) -> list[str]:
    """Print the closing table from the server's own figures; return what did not hold."""
    shown = {row["id"]: row for row in items(shoal("device", "list"))}
    deployments = {row["device_id"]: row for row in items(shoal("rollout", "show", rollout))["deployments"]}  # type: ignore[call-overload]
    variants = {row["profile"]: row for row in items(shoal("variant", "list", "--version", "mnist@1"))}
    table = Table(title="mnist@1 on the fleet, as the server heard it", box=None, padding=(0, 1, 0, 0))
    words = ("device\nprofile", "runtime, provider\nthat really ran")
    numbers = ("size\nMB", "MQTT\nMB", "deploy\ns", "acc.\n%", "macro\nrecall", "macro\nF1", "p50/p95\nms")
    for column in (*words, *numbers):
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    missing = []
    accuracies = {}
    for row in sorted(rows, key=lambda row: str(row["device_id"])):
        device = row["device_id"]
        deployment, serving = deployments[device], shown[device]["serving"][0]
        accuracies[deployment["profile"]] = row["accuracy"]
        table.add_row(
            f"{device}\n{deployment['profile']}",
            f"{serving['runtime']} {serving['provider']}".replace(" ", "\n", 1),
            f"{deployment['artifact_bytes'] / 1e6:.3f}",
            f"{deployment['received_bytes'] / 1e6:.3f}",
            f"{deployment['deploy_s']:.1f}",
            f"{row['accuracy'] * 100:.2f}",
            f"{row['macro_recall']:.3f}",
            f"{row['macro_f1']:.3f}",
            f"{row['latency_p50_ms']:.2f}/{row['latency_p95_ms']:.2f}",
        )
        if row["requests"] < IMAGES or row["errors"]:
            missing.append(f"{device}: {row['requests']} requests answered, {row['errors']} errors")
        if deployment["phase"] != "active":
            missing.append(f"{device}: its deployment is {deployment['phase']}")
    console.print(table)
    full = variants["onnx-cpu-fp32"]
    for profile in ("onnx-cpu-int8", "litert-int8"):
        ratio = variants[profile]["size"] / full["size"]
        loss = (accuracies["onnx-cpu-fp32"] - accuracies[profile]) * 100
        console.print(f"{profile}: {ratio:.3f} of the size of fp32, {loss:+.2f} points of accuracy lost on the device")
        if ratio > 0.30:
            missing.append(f"{profile} has {ratio:.3f} of fp32's size, not at most 0.30")
        if loss > 0.5:
            missing.append(f"{profile} lost {loss:.2f} points of accuracy, more than 0.5")
    return missing


def refuse_broken(shoal: Shoal, profiles: list[str]) -> list[str]:
    """Push the broken version: the gate has to refuse each variant, and a rollout of it has to be refused."""
    console.rule("a broken version: the right format, the wrong weights")
    push(shoal, "mnist@2", "broken.safetensors")
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    shoal("variant", "build", "mnist@2", *chosen, expect=1)
    missing = []
    for variant in items(shoal("variant", "list", "--version", "mnist@2")):
        failed = [check for check in (variant["gate"] or {"checks": []})["checks"] if not check["holds"]]
        console.print(f"[bold red]{variant['state']}[/] {variant['profile']}: {'; '.join(c['detail'] for c in failed)}")
        if variant["state"] != "refused" or not failed:
            missing.append(f"the gate did not refuse mnist@2 for {variant['profile']}")
    shoal("rollout", "create", "mnist@2", "--all", expect=5)
    console.print("a rollout of it is refused, and the devices go on with mnist@1")
    return missing


def run(processes: Processes, devices: list[DemoDevice]) -> str:
    """Everything between start and stop: the URL of the API.

    Raises:
        DemoError: saying all that did not hold.
    """
    data = load_mnist(HOME / "data")
    prepare_files(data)
    console.rule("server, broker and three agents")
    url = start_all(processes, devices)
    wait_for("the server", 60, lambda: processes.check() or is_open(url))
    shoal = Shoal(url, ADMIN_TOKEN.read_text().strip())
    for device in devices:
        shoal("profile", "create", "-f", "-", stdin=json.dumps(device.spec))
    wait_for(
        "three devices online with their profiles",
        60,
        lambda: (
            {row["profile"] for row in shoal_quiet(shoal, "device", "list") if row["online"]}
            == {device.profile for device in devices}
        ),
    )
    console.rule("push, convert per profile, gate")
    push(shoal, "mnist@1", "weights.safetensors")
    profiles = [device.profile for device in devices]
    shoal("variant", "build", "mnist@1", *[part for profile in profiles for part in ("--profile", profile)])
    console.rule("measure the candidates on the devices")
    for profile in profiles:
        shoal("gate", "run", "mnist@1", "--profile", profile)
    console.rule("roll out in two stages")
    rollout = shoal("rollout", "create", "mnist@1", "--all", "--stages", "33%:2s,100%")["id"]
    wait_for(
        "the rollout",
        120,
        lambda: shoal_quiet(shoal, "rollout", "list") and state_of(shoal, rollout) == "succeeded",
    )
    for verdict in shoal("rollout", "show", rollout)["rollout"]["verdicts"]:
        console.print(f"  stage {verdict['stage'] + 1}: {verdict['decision']}: {verdict['reason']}")
    console.rule("infer on the devices")
    rows = measure(shoal, devices, data)
    missing = show(shoal, rows, rollout)
    missing += refuse_broken(shoal, profiles)
    if missing:
        raise DemoError("; ".join(missing))
    return url


def state_of(shoal: Shoal, rollout: str) -> str:
    """The rollout's state.

    Raises:
        DemoError: when it ended otherwise than by success.
    """
    view = next(row for row in shoal_quiet(shoal, "rollout", "list") if row["id"] == rollout)
    if view["state"] in {"paused", "reverting", "reverted", "stopped"}:
        raise DemoError(f"the rollout is {view['state']}: {view['verdicts'][-1]['reason']}")
    state: str = view["state"]
    return state


def is_open(url: str) -> bool:
    """Whether the server answers that it is ready."""
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    return False


@contextlib.contextmanager
def running(*, keep: bool) -> Iterator[Processes]:
    """Processes that end with the demo, whatever happens, unless they are to be kept."""
    processes = Processes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = True
    try:
        yield processes
        failed = False
    finally:
        if failed or not keep:
            processes.stop()


def main() -> None:
    """Run the demo; exit 0 only if all of it held."""
    keep = os.environ.get("KEEP", "") not in {"", "0"}
    devices = make_devices()
    for stale in ("server", "logs", *(device.name for device in devices)):
        shutil.rmtree(HOME / stale, ignore_errors=True)
    (HOME / "logs").mkdir(parents=True)
    started = time.monotonic()
    try:
        with running(keep=keep) as processes:
            url = run(processes, devices)
    except DemoError as error:
        console.print(f"[bold red]The demo failed:[/] {error}\nLogs: {HOME / 'logs'}", highlight=False)
        sys.exit(1)
    console.print(f"[bold green]All of it held[/], in {time.monotonic() - started:.0f} s.")
    if keep:
        console.print(
            f"\nIt is still running. Try, with [bold]export SHOAL_URL={url} SHOAL_TOKEN=$(cat {ADMIN_TOKEN})[/]:\n"
            "  .venv/bin/shoal device list\n"
            "  .venv/bin/shoal variant list --version mnist@1\n"
            f"  curl -s http://127.0.0.1:{devices[0].port}/v2/models/mnist\n"
            f"  {url}/docs in a browser\n"
            f"Stop it with: kill {' '.join(map(str, processes.pids))}",
            highlight=False,
        )


if __name__ == "__main__":
    main()
