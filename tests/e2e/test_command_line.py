"""`shoal` against a real server: exit codes, JSON for machines, and a whole fleet by one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from fleet_server.cli.main import app
from fleet_server.clock import utc_now
from tests.cli import CliRunner, Result
from tests.fleet import BIN, LocalFleet, free_port, wait_until, write_classifier, write_data

TOKEN = "correct-horse"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server that wants a token."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_ADMIN_TOKEN=TOKEN)
        yield fleet
    finally:
        fleet.stop()


def shoal(fleet: LocalFleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHOAL_URL": fleet.url, "SHOAL_TOKEN": TOKEN, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [str(BIN / "shoal"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def here(fleet: LocalFleet, *arguments: str, token: str = TOKEN) -> Result:
    """The same in this process, which is quicker."""
    environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": token, "COLUMNS": "80", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_exit_codes(fleet: LocalFleet, tmp_path: Path) -> None:
    assert shoal(fleet, "profile", "create", "a", "--runtime", "onnx", "--precision", "fp32").returncode == 0

    invalid = shoal(fleet, "profile", "create", "b", "--runtime", "An Abacus")
    assert invalid.returncode == 1
    assert "runtime" in invalid.stderr
    nobody = here(fleet, "--url", f"http://127.0.0.1:{free_port()}", "device", "list")
    assert nobody.exit_code == 1
    assert "no fleet server answers" in nobody.stderr

    assert here(fleet, "model", "push", "no-version", "x.onnx").exit_code == 2
    assert here(fleet, "device", "frobnicate").exit_code == 2
    unsafe = here(fleet, "model", "push", "m@1", "weights.pt2")
    assert unsafe.exit_code == 2
    assert "safetensors" in unsafe.stderr
    unasked = here(fleet, "profile", "delete", "a")
    assert unasked.exit_code == 2
    assert "--yes" in unasked.stderr

    assert here(fleet, "device", "list", token="wrong").exit_code == 3
    missing = shoal(fleet, "rollout", "show", "nothing")
    assert missing.returncode == 4
    assert "shoal rollout list" in missing.stderr
    assert here(fleet, "profile", "create", "a", "--runtime", "litert").exit_code == 5
    assert "Traceback" not in invalid.stderr + missing.stderr


def test_a_name_leads_to_nothing_else(fleet: LocalFleet) -> None:
    here(fleet, "profile", "create", "stays", "--runtime", "onnx")
    for name in ("", ".", "..", "../devices", "stays/..", "stays?x=1", "stays#x", "st%61ys", "é"):
        missing = here(fleet, "profile", "delete", "--yes", name)
        assert missing.exit_code == 4, f"{name!r}: {missing.stderr}"
        assert here(fleet, "rollout", "abort", name).exit_code == 4
    assert here(fleet, "profile", "show", "stays").exit_code == 0
    assert here(fleet, "model", "show", "@1").exit_code == 4


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--url", "nonsense"), 1, "SHOAL_URL"),
        (("--url", "http://[::"), 1, "SHOAL_URL"),
        (("--token", "é"), 3, "SHOAL_TOKEN"),
        (("--token", "two\nlines"), 3, "SHOAL_TOKEN"),
    ],
)
def test_a_connection_that_can_not_be(fleet: LocalFleet, options: tuple[str, ...], code: int, said: str) -> None:
    refused = here(fleet, *options, "device", "list")
    assert refused.exit_code == code
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"a: [1", 2),
        (b"{", 2),
        (b"\xff\xfe", 2),
        (b"- a list", 2),
        (b"name: n\nruntime: onnx\nmatch: {memory_mb: {min: .inf}}\n", 2),
        (b"name: dated\nruntime: onnx\nmatch: {tags.day: 2024-01-01}\n", 0),
    ],
)
def test_profile_files(fleet: LocalFleet, tmp_path: Path, content: bytes, code: int) -> None:
    (tmp_path / "profile.yaml").write_bytes(content)
    made = here(fleet, "profile", "create", "-f", str(tmp_path / "profile.yaml"), "-o", "json")
    assert made.exit_code == code, made.stderr
    if code == 0:
        assert json.loads(made.stdout)["spec"]["match"] == {"tags.day": "2024-01-01"}


def test_from_a_model_to_a_variant_and_away_again(fleet: LocalFleet, tmp_path: Path) -> None:
    here(fleet, "profile", "create", "plain", "--runtime", "onnx", "--precision", "fp32")
    write_classifier(tmp_path / "model.onnx")
    write_data(tmp_path / "evaluation.npz", rows=50, seed=1)
    (tmp_path / "labels.txt").write_text("low\nmiddle\nhigh")  # no line end after the last
    files: tuple[str, ...] = (str(tmp_path / "model.onnx"), "--evaluation", str(tmp_path / "evaluation.npz"))
    unread = here(fleet, "model", "push", "m@1", *files, "--labels", str(tmp_path / "none.txt"))
    assert unread.exit_code == 2
    assert "--labels" in unread.stderr
    files = (*files, "--labels", str(tmp_path / "labels.txt"))
    pushed = here(fleet, "model", "push", "m@1", *files, "-o", "json")
    assert pushed.exit_code == 0, pushed.stderr
    assert json.loads(pushed.stdout)["reference"] == "m@1"
    built = here(fleet, "variant", "build", "m@1", "--profile", "plain", "-o", "json")
    assert built.exit_code == 0, built.stderr
    (variant,) = json.loads(built.stdout)
    assert variant["state"] == "ready"
    shown = {
        words[0]: json.loads(here(fleet, *words, "-o", "json").stdout)
        for words in (("profile", "show", "plain"), ("model", "show", "m@1"), ("variant", "show", variant["id"]))
    }
    assert shown["profile"]["spec"]["runtime"] == "onnx"
    assert shown["model"]["labels"] == ["low", "middle", "high"]
    assert shown["variant"]["digest"] == variant["digest"]
    assert [one["name"] for one in json.loads(here(fleet, "model", "show", "m", "-o", "json").stdout)] == ["1"]
    nobody = here(fleet, "rollout", "create", "m@1", "--all")
    assert nobody.exit_code == 1
    assert "no device" in nobody.stderr
    assert here(fleet, "model", "delete", "m@1", "--yes").exit_code == 0
    assert here(fleet, "model", "show", "m@1").exit_code == 4


def test_a_rollout_by_commands(fleet: LocalFleet, tmp_path: Path) -> None:
    fleet.start_agent("dev-1", line="3")
    here(fleet, "profile", "create", "line", "--runtime", "onnx", "--precision", "fp32", "--match", "tags.line=3")
    wait_until("its profile", lambda: '"line"' in here(fleet, "device", "list", "-o", "json").stdout)
    write_classifier(tmp_path / "model.onnx", seed=1)
    write_data(tmp_path / "evaluation.npz", rows=50, seed=1)
    files = (str(tmp_path / "model.onnx"), "--evaluation", str(tmp_path / "evaluation.npz"))
    assert here(fleet, "model", "push", "r@1", *files).exit_code == 0
    assert here(fleet, "variant", "build", "r@1", "--profile", "line").exit_code == 0
    unproven = here(fleet, "rollout", "create", "r@1", "--tag", "line=3")
    assert unproven.exit_code == 5
    assert "shoal gate run r@1 --profile line" in unproven.stderr
    measured = here(fleet, "gate", "run", "r@1", "--profile", "line")
    assert measured.exit_code == 0, measured.stderr
    assert "holds  provider: ran on cpu, asked for cpu" in measured.stdout
    (run,) = json.loads(here(fleet, "gate", "list", "--version", "r@1", "-o", "json").stdout)
    assert run["trials"][0]["device_id"] == "dev-1"
    assert here(fleet, "gate", "cancel", run["id"]).exit_code == 5
    assert here(fleet, "gate", "show", "nothing").exit_code == 4
    done = here(fleet, "rollout", "create", "r@1", "--tag", "line=3", "--stages", "100%", "--watch", "-o", "json")
    assert done.exit_code == 0, done.stderr
    rollout = json.loads(done.stdout)
    assert rollout["state"] == "succeeded"
    shown = json.loads(here(fleet, "rollout", "show", rollout["id"], "-o", "json").stdout)
    assert [one["phase"] for one in shown["deployments"]] == ["active"]
    assert json.loads(here(fleet, "device", "show", "dev-1", "-o", "json").stdout)["serving"][0]["model"] == "r"
    assert json.loads(here(fleet, "rollout", "watch", rollout["id"], "-o", "json").stdout)["state"] == "succeeded"
    paused = here(fleet, "rollout", "pause", rollout["id"])
    assert paused.exit_code == 5
    assert "succeeded" in paused.stderr
    assert here(fleet, "model", "delete", "r@1", "--yes").exit_code == 5
    assert here(fleet, "rollout", "create", "r@1", "--all", "--stages", "half").exit_code == 2


def test_drift_by_commands(fleet: LocalFleet) -> None:
    """Of what the test above rolled out."""
    chance = np.random.default_rng(1)

    def ask(middle: float, total: int) -> None:
        for _ in range(40):
            fleet.infer("dev-1", "r", chance.normal(middle, 1, (4, 8)).astype(np.float32))
            time.sleep(0.03)  # of what comes at once not all is looked at
        wait_until(
            "all of it is told",
            lambda: sum(one["requests"] for one in fleet.get("/telemetry/models", model="r")["items"]) == total,
        )

    ask(0.0, 40)
    began = utc_now().isoformat()
    ask(5.0, 80)
    shown = here(fleet, "model", "drift", "r@1", "--since", began, "--device", "dev-1", "--bins")
    assert shown.exit_code == 0, shown.stderr
    assert "reference: 40 requests, 1 devices (the first telemetry that there is)" in shown.stdout
    assert "now: 40 requests, 1 devices" in shown.stdout
    assert "input x: mean" in shown.stdout
    found = json.loads(here(fleet, "model", "drift", "r@1", "--since", began, "-o", "json").stdout)
    figures = {one["metric"]: one["value"] for one in found["figures"]}
    assert figures["input_drift"] > 1
    (moved,) = [one for one in found["distributions"] if one["part"] == "mean" and one["kind"] == "input"]
    assert sum(one["now"] for one in moved["bins"] if one["low"] is None or one["low"] > 2.5) > 0.9
    wrong = here(fleet, "model", "drift", "r@1", "--query", "site=")
    assert wrong.exit_code == 1
    assert "query" in wrong.stderr
    assert here(fleet, "model", "drift", "r").exit_code == 2
    assert here(fleet, "model", "drift", "r@9").exit_code == 4


def test_people_and_programs_get_access_by_commands(fleet: LocalFleet, tmp_path: Path) -> None:
    def run(*arguments: str, token: str | None = None, said: str | None = None) -> Result:
        environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": token, "XDG_CONFIG_HOME": str(tmp_path), "COLUMNS": "80"}
        done = CliRunner().invoke(app, arguments, env=environment, input=said)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    assert run("whoami").exit_code == 3
    made = run("user", "create", "ada", "--role", "viewer", token=TOKEN, said="correct horse battery\n")
    assert made.exit_code == 0, made.stderr
    assert run("login", "ada", said="wrong\n").exit_code == 3
    assert run("login", "ada", said="correct horse battery\n").exit_code == 0
    kept = tmp_path / "shoal" / "credentials.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert json.loads(run("whoami", "-o", "json").stdout)["name"] == "user/ada"
    refused = run("profile", "create", "z", "--runtime", "onnx")
    assert refused.exit_code == 3
    assert "role operator" in refused.stderr.replace("\n", " ")
    assert run("user", "update", "ada", "--role", "operator", token=TOKEN).exit_code == 0
    assert json.loads(run("whoami", "-o", "json").stdout)["role"] == "operator"
    assert run("logout").exit_code == 0
    assert run("whoami").exit_code == 3
    assert run("logout").exit_code == 1
    assert run("user", "delete", "ada", "--yes", token=TOKEN).exit_code == 0
    assert run("fleet", "create", "plant7", token=TOKEN).exit_code == 0
    ci = ("token", "create", "ci", "--role", "viewer", "-o", "json")
    created = json.loads(run("--fleet", "plant7", *ci, token=TOKEN).stdout)
    assert json.loads(run("whoami", "-o", "json", token=created["token"]).stdout)["fleet"] == "plant7"
    assert run("--fleet", "default", "whoami", token=created["token"]).exit_code == 3
    assert run("--fleet", "plant7", "token", "revoke", created["id"], "--yes", token=TOKEN).exit_code == 0
    assert run("whoami", token=created["token"]).exit_code == 3
    assert run("fleet", "update", "plant7", "--approvals", "2", token=TOKEN).exit_code == 0
    verified = run("audit", "verify", "-o", "json", token=TOKEN)
    assert (verified.exit_code, json.loads(verified.stdout)["whole"]) == (0, True)


def test_every_list_is_json_for_machines_and_fits_a_terminal(fleet: LocalFleet) -> None:
    groups = ("device", "profile", "model", "variant", "rollout", "audit", "fleet", "user", "token")
    lists = tuple((group,) for group in groups)
    for words in (
        *[(*group, "list") for group in lists],
        ("telemetry", "models"),
        ("telemetry", "hosts"),
        ("telemetry", "drift"),
    ):
        assert isinstance(json.loads(here(fleet, *words, "-o", "json").stdout), list)
        table = here(fleet, *words)
        assert table.exit_code == 0
        assert [line for line in (table.stdout + table.stderr).splitlines() if len(line) > 80] == []


def test_who_enrols_needs_no_user_s_token_and_decides_nothing(fleet: LocalFleet) -> None:
    api = httpx.Client(base_url=f"{fleet.url}/api/v1")
    with api:
        assert api.get("/ca").json()["pin"]
        assert "X509 CRL" in api.get("/crl").text
        assert api.post("/enrolments", json={"device_id": "a", "csr": "none"}).status_code == 422
        assert api.get("/enrolments/nothing").status_code == 404
        for method, path in (
            ("GET", "/enrolments"),
            ("POST", "/enrolments/x/approve"),
            ("POST", "/enrolments/x/reject"),
            ("POST", "/enrolment-tokens"),
            ("GET", "/enrolment-tokens"),
            ("DELETE", "/enrolment-tokens/x"),
            ("GET", "/device-identities"),
            ("POST", "/device-identities"),
            ("POST", "/server-certificates"),
            ("GET", "/devices/x/identity"),
            ("POST", "/devices/x/revoke"),
        ):
            assert api.request(method, path).status_code == 401, path


def test_up_starts_a_whole_fleet_and_ctrl_c_stops_all_of_it(tmp_path: Path) -> None:
    port = free_port()
    command = [str(BIN / "shoal"), "up", "--agents", "2", "--state", str(tmp_path / "state"), "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        url = f"http://127.0.0.1:{port}/api/v1/devices"
        token = tmp_path / "state" / "server" / "admin-token"

        def online() -> bool:
            if not token.exists():
                return False
            headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
            answer = httpx.get(url, headers=headers)
            return answer.is_success and len([one for one in answer.json()["items"] if one["online"]]) == 2

        wait_until("two devices", online, 240)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 4
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        _, left = psutil.wait_procs(started, timeout=5)
    assert [one.name() for one in left] == []
