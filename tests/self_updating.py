"""Devices that update themselves: real launchers, agents, workers and a broker; releases good and bad."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import msgspec
import psutil

from agent.protocol.lifecycle import Phase
from agent.protocol.release import INFO, SITE, ReleaseInfo, ReleaseManifest, own_platform
from agent.releases.book import ReleaseBook, ReleaseRecord
from agent.releases.releases import NOTE
from agent.update.journal import Journal
from agent.update.updater import Record
from deploy.agent_release.build import ROOT, build, pack
from tests.fleet import free_port, wait_until
from tests.serving_worker import write_echo

CHUNK = 256 * 1024
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2.0]}]}
# What each kind of bad release does: the file, and the lines that take its place, or come after it.
BAD = {
    "crashes": ("agent/main.py", "raise SystemExit(3)\n", False),
    "hangs": ("agent/main.py", "import time\ntime.sleep(1000)\n", False),
    "never connects": ("agent/mqtt.py", "\nMqttLink.start = lambda self: None\n", True),
    "its worker does not come up": ("agent/serving/worker.py", "raise SystemExit(4)\n", False),
}
SPOILS = """
import os, sqlite3, sys, tomllib
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
journal = sqlite3.connect(config["state_dir"] + "/journal.db")
journal.execute("UPDATE deployments SET record = '{}'")
journal.execute("UPDATE notes SET value = CAST('of another form' AS BLOB)")
journal.commit()
os._exit(5)
"""


class Bundles:
    """Releases of this tree: compiled once, and changed for each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._site = folder / "made" / SITE
        self._site.mkdir(parents=True)
        self.good = build(self._site, folder / "good", version="9.0.0")

    def bad(self, kind: str, name: str, text: str, after: bool = False) -> Path:
        """One with another file, or with more in it."""
        site = self._folder / kind / SITE
        shutil.rmtree(self._folder / kind, ignore_errors=True)
        shutil.copytree(self._site, site)
        path = site / name
        path.write_text((path.read_text() if after else "") + text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        return pack(site, self._folder / kind, version="9.0.1", compiled=False)


def manifest(bundle: Path) -> ReleaseManifest:
    """As a server makes it."""
    import tarfile

    with tarfile.open(bundle) as archive:
        file = archive.extractfile(INFO)
        assert file is not None
        info = msgspec.json.decode(file.read(), type=ReleaseInfo)
    assert info.platform == own_platform()
    content = bundle.read_bytes()
    return ReleaseManifest(hashlib.sha256(content).hexdigest(), len(content), CHUNK, info)


@dataclass
class Asked:
    """What somebody saw who asks a device all the time, each time by a new connection."""

    bodies: set[str] = field(default_factory=set)
    answers: int = 0
    refused: int = 0
    cut: int = 0
    other: int = 0
    longest_s: float = 0.0


class Device:
    """One with a model that serves, and a release that lies in its store and is wanted.

    Args:
        folder: of its own; its name is the device's id.
        broker_port: of a broker on this machine that takes everybody.
        bundle: the release.
        settings: more lines of its configuration.
        confirm_s: within which a release must prove itself.
        most_starts: of a release on trial.
        contained: start it as the first process of a PID namespace, as in a container; needs root.
    """

    def __init__(
        self,
        folder: Path,
        broker_port: int,
        bundle: Path,
        *,
        settings: str = "",
        confirm_s: float = 30.0,
        most_starts: int = 2,
        contained: bool = False,
    ) -> None:
        self._before = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if contained else []
        self.state = folder / "state"
        self.log = folder / "log"
        self.port = free_port()
        (self.state / "artifacts").mkdir(parents=True)
        self._config = folder / "agent.toml"
        self._config.write_text(
            f'device_id = "{folder.name}"\nstate_dir = "{self.state}"\nbroker = "mqtt://127.0.0.1:{broker_port}"\n'
            f'listen = "127.0.0.1:{self.port}"\ndisk_floor_mb = 1\n{settings}'
        )
        journal = Journal(self.state / "journal.db")
        echo = self.state / "echo"
        model = write_echo(echo, "float32", 2)
        content = echo.read_bytes()
        model = msgspec.structs.replace(
            model, model="echo", digest=hashlib.sha256(content).hexdigest(), size=len(content)
        )
        echo.rename(self.state / "artifacts" / model.digest)
        journal.save({"m-1": Record("m-1", model, probation_s=0, deadline_s=60, phase=Phase.ACTIVE, wanted=True)})
        self.release = manifest(bundle)
        shutil.copy(bundle, self.state / "artifacts" / self.release.digest)
        book, signed = ReleaseBook(b""), msgspec.json.encode(self.release)
        book.records["r-1"] = ReleaseRecord("r-1", signed, confirm_s, most_starts, deadline_s=60, trusted=True)
        journal.keep_note(NOTE, book.packed())
        journal.close()
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._before, sys.executable, "-m", "agent.launcher", "run", "--config", str(self._config)],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> int:
        """Ask it to end, as who started it would: systemd, or a container engine its first process."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        asked = process.children()[0].pid if self._before else process.pid
        os.kill(asked, signal.SIGTERM)
        return self.process.wait(30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def record(self) -> ReleaseRecord | None:
        """As the journal has it, beside the agent; None while nothing can be read of it."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.state}/journal.db?mode=ro", uri=True)) as journal:
                row = journal.execute("SELECT value FROM notes WHERE name = ?", (NOTE,)).fetchone()
        except sqlite3.Error:
            return None
        return ReleaseBook(row[0]).records.get("r-1") if row else None

    def version(self) -> str:
        """Of the agent that answers."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/v2", timeout=30)
        return str(answer.json()["version"])

    def ask(self) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}/v2/models/echo/infer", json=ROW, timeout=60)

    def serves(self) -> bool:
        return self.ask().status_code == 200


class Client:
    """Asks a device again and again, until it is told to stop."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seen = Asked()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> Asked:
        self._stop.set()
        self._thread.join(60)
        return self.seen

    def _run(self) -> None:
        seen = self.seen
        while not self._stop.wait(0.01):
            began = time.monotonic()
            try:
                answer = self._device.ask()
            except httpx.ConnectError:
                seen.refused += 1
            except httpx.TransportError:
                seen.cut += 1
            else:
                seen.answers += answer.status_code == 200
                seen.other += answer.status_code != 200
                if answer.status_code == 200:
                    seen.bodies.add(str(answer.json()["outputs"]))
            seen.longest_s = max(seen.longest_s, time.monotonic() - began)


def settled(device: Device, phase: Phase, seconds: float = 60) -> ReleaseRecord:
    """The release's deployment, when it has come there."""

    def there() -> ReleaseRecord | None:
        found = device.record()
        return found if found is not None and found.phase is phase else None

    return wait_until(f"{phase}: {device.log.read_text()[-2000:]}", there, seconds)


def main() -> None:
    """What clients notice of a switch: `python -m tests.self_updating`, beside as long without one."""
    from fleet_server.gateway.broker import find_mosquitto

    with tempfile.TemporaryDirectory(prefix="shoal-switch-") as name:
        folder, port = Path(name), free_port()
        (folder / "conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
        executable, environment = find_mosquitto("mosquitto")
        broker = subprocess.Popen([str(executable), "-c", str(folder / "conf")], env=dict(environment))
        bundles = Bundles(folder)
        device = Device(folder / "dev", port, bundles.good)
        try:
            device.start()
            wait_until("an answer", device.serves)
            began, client = time.monotonic(), Client(device)
            settled(device, Phase.ACTIVE)
            switch, took_s = client.stop(), time.monotonic() - began
            still = Client(device)
            time.sleep(took_s)
            print(json.dumps({"switch": _told(switch), "without": _told(still.stop()), "seconds": round(took_s, 1)}))
        finally:
            device.kill()
            broker.terminate()
            broker.wait()


def _told(seen: Asked) -> dict[str, object]:
    return {**asdict(seen), "bodies": len(seen.bodies), "longest_s": round(seen.longest_s, 3)}


if __name__ == "__main__":
    main()
