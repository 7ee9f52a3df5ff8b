"""What lies in deploy/ names what there is: commands, settings, files, extras; and its units are bounded."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from agent.config import KEYS, PREFIX, load_config
from deploy.debian.build import PACKAGES
from deploy.release.extras import DOES
from deploy.release.sources import changes, debian_version, version
from fleet_server.settings import Settings
from tests.contract.test_locks import lock, pins

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILES = sorted((DEPLOY / "images").glob("*.Dockerfile"))
SETTINGS = {f"SHOAL_{name.upper()}" for name in Settings.model_fields}
AGENT_SETTINGS = {PREFIX + key.upper() for key in KEYS}
# What is no setting of a daemon: of the enrolling command and of what starts it, of `shoal`, of the keeper of a broker.
OTHERS = {
    "SHOAL_AGENT_TOKEN",
    "SHOAL_AGENT_TOKEN_FILE",
    "SHOAL_ENROLMENT_SERVER",
    "SHOAL_ENROLMENT_CA_FILE",
    "SHOAL_URL",
    "SHOAL_TOKEN",
    "SHOAL_CA_FILE",
    "SHOAL_CHROOT_BASE",
}
BOUNDS = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "CapabilityBoundingSet": "",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
}


def keys(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_bounded_and_starts_what_its_package_has(unit: Path) -> None:
    found = keys(unit)
    assert {key: found.get(key, [None])[-1] for key in BOUNDS} == BOUNDS
    assert set(found["RestrictAddressFamilies"][0].split()) <= {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged"]
    (package,) = [one for one in PACKAGES.values() if unit.name in one.units]
    program = found["ExecStart"][0].split()[0]
    assert program.removeprefix(f"/opt/{package.name}/bin/") in {*package.commands, "python"}
    assert found["User"] == found["Group"] == [package.name]


@pytest.mark.parametrize("name", ["shoal-agent", "shoal-server"])
def test_a_daemon_is_watched_bounded_in_memory_and_started_again(name: str) -> None:
    found = keys(DEPLOY / "systemd" / f"{name}.service")
    assert (found["Type"], found["Restart"], found["StartLimitIntervalSec"]) == (["notify"], ["always"], ["0"])
    assert int(found["WatchdogSec"][0]) >= 60
    assert found["OOMPolicy"] == ["continue"], "what the kernel ends is the daemon's to start again"
    assert {"MemoryHigh", "MemoryMax", "TasksMax"} <= set(found)
    wanted = (DEPLOY / "debian" / name / "postinst").read_text()
    assert f"unit={name}.service" in wanted
    assert f"user={name}" in wanted


def test_units_refer_to_units_that_there_are() -> None:
    ours = {unit.name for unit in UNITS}
    assert ours == {name for package in PACKAGES.values() for name in package.units}
    named = {name for unit in UNITS for name in re.findall(r"\bshoal-[a-z-]+\.service\b", unit.read_text())}
    assert named <= ours


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_understands_every_line_and_finds_little_exposed(unit: Path, tmp_path: Path) -> None:
    # Its programs are not installed here: any that are there do, to have the rest read.
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"=([+-]*)/opt/\S+", r"=\1/bin/true", unit.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    # Known from systemd 254 on, and told in the unit.
    later = ("RestartSteps", "RestartMaxDelaySec")
    wrong = [line for line in done.stderr.splitlines() if unit.name in line and not any(key in line for key in later)]
    assert wrong == []
    rated = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(copy)]
    exposed = subprocess.run(rated, capture_output=True, text=True, check=False)
    assert exposed.returncode == 0, exposed.stdout[-400:] + exposed.stderr[-400:]


def test_the_packaged_configuration_is_one(tmp_path: Path) -> None:
    text = (DEPLOY / "debian" / "shoal-agent" / "etc" / "shoal" / "agent.toml").read_text()
    (tmp_path / "agent.toml").write_text(text.replace("/var/lib/shoal-agent", str(tmp_path)))
    assert load_config(tmp_path / "agent.toml", {}).listen == "127.0.0.1:8470"
    commented = re.findall(r"^# ([a-z_]+) = ", text, re.MULTILINE)
    assert commented
    assert set(commented) <= set(KEYS)
    environment = (DEPLOY / "debian" / "shoal-server" / "etc" / "shoal" / "server.env").read_text()
    lines = re.findall(r"^(SHOAL_[A-Z_]+)=(.*)$", environment, re.MULTILINE)
    assert Settings(**{name.removeprefix("SHOAL_").lower(): value for name, value in lines}).broker_tls


def test_every_variable_that_is_named_is_a_setting() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in {".lock", ".pyc", ".json"}]
    unknown = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if not {"dev", "demo", "locks"} & set(path.relative_to(DEPLOY).parts)
        for name in re.findall(r"\bSHOAL_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())
        if name not in SETTINGS | AGENT_SETTINGS | OTHERS
    }
    assert unknown == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_copies_what_there_is_and_runs_as_nobody_special(path: Path) -> None:
    text = path.read_text()
    context = [line.lstrip("!") for line in Path(f"{path}.dockerignore").read_text().split() if line.startswith("!")]
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source.startswith(kept) for kept in context), f"{source} is not in the build's context"
    built = set(re.findall(r"/dist/(shoal-(?:agent|server))_", text))
    assert built <= set(PACKAGES)
    assert re.findall(r"^USER (\d+):\1$", text, re.MULTILINE), "it runs as a user with a number"
    assert "HEALTHCHECK" in text
    assert text.rstrip().splitlines()[-1].startswith(("ENTRYPOINT [", "CMD ["))


def test_the_compose_file_mounts_files_that_there_are_and_every_secret_is_in_the_example() -> None:
    folder = DEPLOY / "compose"
    text = (folder / "compose.yaml").read_text()
    found = yaml.safe_load(text)
    named = {name for one in found["services"].values() for name in one.get("depends_on", [])}
    assert named <= set(found["services"])
    mounts = [one.split(":") for service in found["services"].values() for one in service.get("volumes", [])]
    assert {source for source, *_ in mounts if not source.startswith(".")} == set(found["volumes"])
    assert [source for source, *_ in mounts if source.startswith(".") and not (folder / source).exists()] == []
    asked = set(re.findall(r"\$\{([A-Z_]+):\?\}", text))
    assert asked == set(re.findall(r"^([A-Z_]+)=", (folder / "example.env").read_text(), re.MULTILINE))


def test_the_chart_uses_every_value_and_no_other() -> None:
    chart = DEPLOY / "helm" / "shoal"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    used = {
        name
        for path in (chart / "templates").iterdir()
        for name in re.findall(r"\.Values\.([A-Za-z.]+)", path.read_text())
    }

    def leaves(table: dict[str, object], before: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in table.items():
            whole = isinstance(value, dict) and key not in {"settings", "resources"}
            found |= leaves(value, f"{before}{key}.") if whole else {before + key}  # type: ignore[arg-type]
        return found

    assert used == leaves(values)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    assert about["appVersion"] == version()


def test_every_extra_is_tried_alone() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(DOES) == {"", *declared}


def test_a_device_gets_twelve_packages_at_most_beside_its_runtimes_own() -> None:
    def closure(name: str) -> set[str]:
        found = {re.sub(r"[-_.]+", "-", name).lower()}
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
                found |= closure(wanted.name)
        return found

    beside = set(pins(lock("agent"))) - closure("onnxruntime")
    assert len(beside) + 1 <= 12, f"with shoal itself: {sorted(beside)}"


def test_the_version_and_its_changes_are_told() -> None:
    assert changes(version()).startswith(f"## {version()}")
    assert re.fullmatch(r"[0-9][0-9A-Za-z.+~]*", debian_version())
