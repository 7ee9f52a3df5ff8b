"""A fleet of one from the installed packages: in a chroot (deploy/chroot-check) or a system that booted (boot-check).

It runs there, as root. Without systemd it starts what the units start, as they say: ExecStart by the unit's user, with
its folders, environment and umask, where its conditions hold; it waits for READY=1 and watches the signs of life as
systemd would. What is done then is what people would do: list the device, push a model, roll it out, ask it.

Standard library only: it runs by Debian's own interpreter.
"""

from __future__ import annotations

import grp
import io
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

UNITS = Path("/lib/systemd/system")
WORK = Path("/root/shoal-check")
STARTS_S = 30.0  # of the watchdog while agents are started one after the other, on a machine that may be busy
DEADLINE_S = 10.0  # of the watchdog: shorter than the units', so that a check sees it kept
TOKENS = (Path("/run/shoal-local-token/enrolment.env"), Path("/etc/shoal/enrolment.env"))
MODEL = """
import sys, numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
factor, path = float(sys.argv[1]), sys.argv[2]
weights = np.eye(8, 3, dtype=np.float32) * factor
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["scores"])], "largest",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])], [numpy_helper.from_array(weights, "w")])
made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
made.ir_version = 9
onnx.save(made, path + "/m.onnx")
x = np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32)
np.savez(path + "/e.npz", x=x, y=x[:, :3].argmax(1))
np.savez(path + "/c.npz", x=x[:100])
"""


class Unit:
    """A service as its file says, in the parts that matter without systemd."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings: dict[str, list[str]] = {}
        for line in (UNITS / f"{name}.service").read_text().splitlines():
            key, sign, value = line.partition("=")
            if sign and not line.startswith(("#", ";")):
                self.settings.setdefault(key.strip(), []).append(value.strip())
        self.user = pwd.getpwnam(self.one("User"))
        self.group = grp.getgrnam(self.one("Group"))
        self.process: subprocess.Popen[bytes] | None = None
        self.heard = 0.0
        self.words: list[str] = []
        self.log = WORK / f"{name}.log"

    def one(self, key: str, default: str = "") -> str:
        """The last value of a key."""
        return self.settings.get(key, [default])[-1]

    @property
    def wanted(self) -> bool:
        """What its conditions say."""
        must, any_of = [], []
        for key, test in (("ConditionPathExists", Path.exists), ("ConditionPathIsDirectory", Path.is_dir)):
            for value in self.settings.get(key, []):
                (any_of if value.startswith("|") else must).append(
                    test(Path(value.lstrip("|!"))) != value.lstrip("|").startswith("!")
                )
        return all(must) and (not any_of or any(any_of))

    def start(self) -> None:
        """Run it: a oneshot to its end, a daemon until it is ready."""
        environment = self._environment()
        self._folders()
        command = [Template(word).safe_substitute(environment) for word in shlex.split(self.one("ExecStart"))]
        notify = self.one("Type") == "notify"
        if notify:
            environment |= {"NOTIFY_SOCKET": self._listen(), "WATCHDOG_USEC": str(int(DEADLINE_S * 1e6))}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *command],
                user=self.user.pw_uid,
                group=self.group.gr_gid,
                extra_groups=[],
                umask=int(self.one("UMask", "0022"), 8),
                cwd=self.one("WorkingDirectory", "/"),
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        if not notify:
            status = self.process.wait(float(self.one("TimeoutStartSec", "90")))
            check(status == 0, f"{self.name} ended with {status}:\n{self.tail()}")
            for post in self.settings.get("ExecStartPost", []):
                words = shlex.split(post.lstrip("+-"))
                if "systemctl" not in words[0]:
                    subprocess.run(words, check=True)
            return
        wait_until(f"{self.name} to be ready", lambda: "READY=1" in self.words or self._ended(), 120)
        check(not self._ended(), f"{self.name} ended:\n{self.tail()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """As systemd does: the main process is asked, and what is left of its session's processes must be gone soon."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(float(self.one("TimeoutStopSec", "90")))
        if number is signal.SIGTERM:
            check("STOPPING=1" in self.words, f"{self.name} did not say that it stops")
        left: Callable[[], bool] = lambda: not processes_of(self.user.pw_uid)  # noqa: E731
        wait_until(f"{self.name}'s processes to be gone", left, 30)

    def alive(self) -> None:
        """Its signs of life came in time."""
        silent = time.monotonic() - self.heard
        check(silent < DEADLINE_S, f"{self.name} has said nothing for {silent:.0f} s: systemd would end it")

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-3000:]

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def _environment(self) -> dict[str, str]:
        found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8"}
        found |= {"HOME": self.user.pw_dir, "USER": self.user.pw_name}
        for value in self.settings.get("Environment", []):
            found |= dict(part.split("=", 1) for part in shlex.split(value))
        for value in self.settings.get("EnvironmentFile", []):
            path = Path(value.lstrip("-"))
            if path.exists():
                lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", ";"))]
                found |= dict(line.split("=", 1) for line in lines)
        return found

    def _folders(self) -> None:
        for key, parent in (("StateDirectory", "/var/lib"), ("RuntimeDirectory", "/run")):
            if self.one(key):
                path = Path(parent, self.one(key))
                path.mkdir(exist_ok=True)
                path.chmod(int(self.one(f"{key}Mode", "0755"), 8))
                shutil.chown(path, self.user.pw_uid, self.group.gr_gid)

    def _listen(self) -> str:
        path = WORK / f"{self.name}.notify"
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(path))
        path.chmod(0o666)
        self.words, self.heard = [], time.monotonic()

        def hear() -> None:
            while True:
                self.words.append(sock.recv(4096).decode())
                self.heard = time.monotonic()

        threading.Thread(target=hear, daemon=True).start()
        return str(path)


class Fleet:
    """Server and agent of this machine, as their units start them."""

    def __init__(self) -> None:
        self.server, self.agent = Unit("shoal-server"), Unit("shoal-agent")

    def start(self, *, expect_enrolment: bool) -> None:
        """In the order of the units' Before= and After=."""
        self.server.start()
        enrolled = []
        for name in ("shoal-local-token", "shoal-agent-enroll"):
            unit = Unit(name)
            if unit.wanted:
                unit.start()
                enrolled.append(name)
                if name == "shoal-local-token":
                    mode = TOKENS[0].stat()
                    check(stat.S_IMODE(mode.st_mode) == 0o600, f"the token's file has mode {mode.st_mode:o}")
                    check(stat.S_IMODE(TOKENS[0].parent.stat().st_mode) == 0o700, "others may look into its folder")
        check(bool(enrolled) == expect_enrolment, f"these ran: {enrolled}")
        check(not any(path.exists() for path in TOKENS), "an enrolment token was left behind")
        self.agent.start()
        wait_until("the device to be online", lambda: [one for one in shoal("device", "list") if one["online"]], 60)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End both."""
        self.agent.stop(number)
        self.server.stop(number)

    def alive(self) -> None:
        """Both have said so."""
        self.server.alive()
        self.agent.alive()


def check(holds: object, otherwise: str) -> None:
    """End with a sentence where something does not hold."""
    if not holds:
        sys.exit(f"FAILED: {otherwise}")


def wait_until(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    """Poll until the condition is truthy; end with all logs where it is not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    sys.exit(
        f"FAILED: waited {seconds:.0f} s for {what}\n"
        + "\n".join(path.read_text()[-3000:] for path in WORK.glob("*.log"))
    )


def processes_of(uid: int) -> list[int]:
    """Those of a user that have not ended."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                owner, state = path.stat().st_uid, (path / "stat").read_text().rpartition(") ")[2][:1]
            except OSError:
                continue
            if owner == uid and state != "Z":
                found.append(int(path.name))
    return found


def shoal(*words: str, json_answer: bool = True) -> Any:
    """The command line of the package, with the admin's token, as root would use it."""
    environment = {
        **os.environ,
        "SHOAL_TOKEN": Path("/var/lib/shoal/admin-token").read_text().strip(),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["shoal", *words, *(["-o", "json"] if json_answer else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    check(done.returncode == 0, f"shoal {' '.join(words)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout) if json_answer else done.stdout


def infer() -> list[float] | None:
    """What the device's local API answers to a row, or None while it does not."""
    row = [0.1, 0.9, 0.2, 0, 0, 0, 0, 0]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": row}]}
    request = urllib.request.Request(
        "http://127.0.0.1:8470/v2/models/largest/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return list(json.load(answer)["outputs"][0]["data"])
    except OSError:
        return None


def answers(factor: float) -> bool:
    """Whether the version serves whose scores are the row's first three numbers, so many times."""
    found = infer()
    return found is not None and abs(found[1] - 0.9 * factor) < 0.05 * factor


def serve(version: int, *, factor: float) -> None:
    """Push a version, convert it for this machine, roll it out, and ask the device."""
    folder = WORK / f"v{version}"
    folder.mkdir(exist_ok=True)
    subprocess.run(["/opt/shoal-server/bin/python", "-c", MODEL, str(factor), str(folder)], check=True)
    files = [str(folder / name) for name in ("m.onnx", "c.npz", "e.npz")]
    name = f"largest@{version}"
    shoal("model", "push", name, files[0], "--calibration", files[1], "--evaluation", files[2])
    shoal("variant", "build", name, "--profile", "here", json_answer=False)
    shoal("rollout", "create", name, "--all", "--stages", "100%", "--allow-unproven", "--watch", json_answer=False)
    wait_until(f"{name} to answer", lambda: answers(factor), 60)


def first(fleet: Fleet) -> None:
    """The first start: enrolment, a model, signs of life."""
    fleet.start(expect_enrolment=True)
    (device,) = shoal("device", "list")
    print(f"  device {device['id']} enrolled by itself and is online")
    first_model()
    time.sleep(DEADLINE_S)
    fleet.alive()
    fleet.stop()


def first_model() -> None:
    """A profile of this machine, and the first version."""
    precisions = ["--precision", "int8", "--precision", "fp32"]
    shoal("profile", "create", "here", "--runtime", "onnx", "--match", f"arch={os.uname().machine}", *precisions)
    serve(1, factor=1.0)
    for row in shoal("variant", "list"):
        print(f"  {row['version']} for {row['profile']}: {row['state']}")
    print("  a model was pushed, converted, rolled out and answers")


def again(fleet: Fleet) -> None:
    """Stopped and killed, and started again."""
    began = time.monotonic()
    fleet.start(expect_enrolment=False)
    wait_until("version 1 to answer after a restart", lambda: answers(1.0), 60)
    print(f"  stopped and started: it answers and is online after {time.monotonic() - began:.1f} s")
    serve(2, factor=2.0)
    print("  a second version was rolled out")
    fleet.stop(signal.SIGKILL)
    fleet.start(expect_enrolment=False)
    wait_until("version 2 to answer after both were killed", lambda: answers(2.0), 60)
    print("  both killed and started: version 2 answers")
    fleet.stop()


def upgraded(fleet: Fleet) -> None:
    """After newer packages were installed."""
    fleet.start(expect_enrolment=False)
    wait_until("version 2 to answer after the upgrade", lambda: answers(2.0), 60)
    (device,) = shoal("device", "list")
    check(device["tags"].get("site") == "plant7", f"the configuration that was edited is not used: {device['tags']}")
    print("  upgraded: it answers, the state is there, the edited configuration holds")
    fleet.stop()


def shown(unit: str, key: str) -> str:
    """A property of a unit, as systemd has it."""
    command = ["systemctl", "show", "--property", key, "--value", f"{unit}.service"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def running() -> None:
    """Both services are up, the device is online, and no token was left."""
    for unit in ("shoal-server", "shoal-agent"):
        wait_until(f"{unit} to be active", lambda unit=unit: shown(unit, "ActiveState") == "active", 60)
        check(shown(unit, "User") == unit, f"{unit} runs as {shown(unit, 'User')}")
    wait_until("the device to be online", lambda: [one for one in shoal("device", "list") if one["online"]], 90)
    check(Path("/var/lib/shoal-agent/identity/identity.json").exists(), "the device has no identity")
    check(not any(path.exists() for path in TOKENS), "an enrolment token was left behind")


def booted() -> None:
    """After `apt install` in a system that runs."""
    running()
    print("  both services run, the device enrolled by itself and is online")
    first_model()
    hangs("shoal-agent")
    wait_until("version 1 to answer after its agent hung", lambda: answers(1.0), 90)
    hangs("shoal-server")
    running()


@contextmanager
def short_watchdog(unit: str, seconds: float = DEADLINE_S) -> Iterator[None]:
    """Start a daemon again with a watchdog that a check sees bite; afterwards its unit is as it was."""
    folder = Path("/run/systemd/system", f"{unit}.service.d")
    folder.mkdir(parents=True)
    (folder / "check.conf").write_text(f"[Service]\nWatchdogSec={seconds:.0f}\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "restart", unit], check=True)
    yield
    shutil.rmtree(folder)
    subprocess.run(["systemctl", "daemon-reload"], check=True)


def never_restarted(unit: str, seconds: float = DEADLINE_S) -> None:
    """Systemd has not had to start it again, though its watchdog had the time to."""
    time.sleep(1.5 * seconds)
    times = int(shown(unit, "NRestarts"))
    check(times == 0, f"{unit} did not say in time that it lives: it was started again {times} times")


def hangs(unit: str) -> None:
    """Stop a daemon in its tracks; its watchdog, made shorter here, has systemd start it again."""
    with short_watchdog(unit):
        never_restarted(unit)
        main = int(shown(unit, "MainPID"))
        os.kill(main, signal.SIGSTOP)
        wait_until(f"systemd to start {unit} again", lambda: int(shown(unit, "NRestarts")) > 0, 120)
        wait_until(f"{unit} to be active", lambda: shown(unit, "ActiveState") == "active", 60)
        check(int(shown(unit, "MainPID")) != main, f"{unit} is the process that hung")
        print(f"  {unit} hung, and was started again by its watchdog")


class Asker:
    """Somebody who asks the device all the time, each time by a new connection."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._refused = self._answered = 0
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.wait(0.02):
            if answers(1.0):
                self._answered += 1
            else:
                self._refused += 1

    def all_answered(self) -> int:
        """Stop; how often it asked."""
        self._ended.set()
        self._thread.join()
        asked = self._refused + self._answered
        check(self._answered and not self._refused, f"{self._refused} of {asked} requests were not answered")
        return self._answered


def agent_version() -> str:
    """What the device says that it runs."""
    (device,) = shoal("device", "list")
    return str(device["facts"]["agent_version"])


def roll_out_release(bundle: Path) -> str:
    """Push a release of the agent and send it to all; the rollout's id."""
    reference = shoal("agent-release", "push", str(bundle))["reference"]
    stages = ("--all", "--stages", "100%")
    return str(shoal("rollout", "create", reference, *stages)["id"])


def crashing(good: Path) -> Path:
    """A release that ends as soon as it is started, made of a good one."""
    path = WORK / "crashing.shoal-release"
    with tarfile.open(good) as source, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as target:
        for member in source:
            file = source.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name == "release.json":
                content = json.dumps(json.loads(content) | {"version": "9.0.1"}).encode()
            elif member.name == "site/agent/main.py":
                content = b"raise SystemExit(3)\n"
            elif member.name.startswith("site/agent/__pycache__/main."):
                continue
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return path


def ended_badly(rollout: str, seconds: float) -> None:
    """Wait until a rollout has been stopped or reverted by the server; end with what it says where it is not."""
    deadline, state = time.monotonic() + seconds, ""
    while state not in {"reverted", "stopped"}:
        found = shoal("rollout", "show", rollout)
        state = found["rollout"]["state"]
        check(time.monotonic() < deadline, f"after {seconds:.0f} s a rollout that fails is {json.dumps(found)}")
        time.sleep(1)


def updated() -> None:
    """The agent becomes a release of itself while systemd watches; a bad one is taken back."""
    running()
    good, unit = Path("/root/good.shoal-release"), "shoal-agent"
    with short_watchdog(unit, STARTS_S):
        wait_until("version 1 to answer", lambda: answers(1.0), 60)
        asker = Asker()
        roll_out_release(good)
        wait_until("the agent to be release 9.0.0", lambda: agent_version() == "9.0.0", 180)
        never_restarted(unit, STARTS_S)
        print(f"  the agent became release 9.0.0, and {asker.all_answered()} requests meanwhile were answered")
        rollout = roll_out_release(crashing(good))
        ended_badly(rollout, 300)
        never_restarted(unit, STARTS_S)
        wait_until("version 1 to answer", lambda: answers(1.0), 60)
        check(agent_version() == "9.0.0", f"the agent is {agent_version()}")
        print("  a release that crashes was tried and taken back; its rollout reverted")
        os.kill(int(shown(unit, "MainPID")), signal.SIGKILL)
        wait_until("systemd to start the agent again", lambda: int(shown(unit, "NRestarts")) == 1, 60)
        wait_until("version 1 to answer after a kill", lambda: answers(1.0), 60)
        check(agent_version() == "9.0.0", f"the agent is {agent_version()}")
    print("  killed, it was started again as release 9.0.0")


def rebooted() -> None:
    """After the machine was switched off and on."""
    running()
    wait_until("version 1 to answer after the boot", lambda: answers(1.0), 60)
    print("  both services came up with the machine; it answers and is online")
    WORK.joinpath("pids").write_text(" ".join(shown(unit, "MainPID") for unit in ("shoal-server", "shoal-agent")))


def restarted() -> None:
    """After newer packages were installed."""
    running()
    wait_until("version 1 to answer after the upgrade", lambda: answers(1.0), 60)
    before = WORK.joinpath("pids").read_text().split()
    now = [shown(unit, "MainPID") for unit in ("shoal-server", "shoal-agent")]
    check(not set(before) & set(now), "the upgrade did not start the services again")
    check(agent_version() == "9.0.0", f"the agent's package has the version it had, and the agent is {agent_version()}")
    print("  upgraded: both were started again; it answers and is online")


def main() -> None:
    """Do what is named."""
    WORK.mkdir(exist_ok=True)
    WORK.chmod(0o755)
    Path("/root").chmod(0o711)
    {
        "first": lambda: first(Fleet()),
        "again": lambda: again(Fleet()),
        "upgraded": lambda: upgraded(Fleet()),
        "booted": booted,
        "rebooted": rebooted,
        "updated": updated,
        "restarted": restarted,
    }[sys.argv[1]]()


if __name__ == "__main__":
    main()
