"""Files of behaviours, and who the devices of a simulated fleet are."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest

from agent.protocol.histogram import bucket_of
from fleet_server.cli.main import app
from fleet_server.devices import shipped
from fleet_server.devices.matching import matches
from fleet_server.devices.schemas import ProfileCreate
from fleet_server.simulator.behaviours import BehavioursError, of_profiles, read
from fleet_server.simulator.chances import Purpose, draw, histogram, shares, stream
from fleet_server.simulator.population import populate
from fleet_server.simulator.presets import PRESETS, with_faults
from fleet_server.simulator.runner import Simulation, SimulationError
from tests.cli import CliRunner

FILE = """
classes:
  - name: pi
    count: 10
    profile: raspberry-pi-5
    tags: {site: "plant{1..3}", line: [a, b], shift: {day: 1, night: 0}}
    latency: {median_ms: {lognormal: [10, 0.5]}}
  - {name: orin, share: 3, profile: jetson-orin}
  - {name: other, share: 1, facts: {arch: riscv64, memory_mb: 512, tags: {a: b}}}
faults:
  - {name: flaky, share: 0.5, cuts_per_hour: 7, slower: 2, clock_offset_s: {uniform: [-10, 10]}}
"""


@pytest.mark.parametrize("name", shipped.names())
def test_devices_of_a_shipped_profile_match_it(name: str) -> None:
    (device,) = populate(of_profiles({name: 1}), 1, 0)
    profile = ProfileCreate.model_validate(shipped.load(name))
    assert matches(msgspec.to_builtins(device.facts), profile)


def test_a_fleet_is_as_its_file_says() -> None:
    fleet = populate(read(FILE), 50, seed=3)
    assert Counter(one.class_name for one in fleet) == {"pi": 10, "orin": 30, "other": 10}
    assert [one.device_id for one in fleet[:2]] == ["sim-00000", "sim-00001"]
    pis = [one for one in fleet if one.class_name == "pi"]
    assert {one.facts.tags["site"] for one in pis} == {"plant1", "plant2", "plant3"}
    assert {one.facts.tags["shift"] for one in pis} == {"day"}
    assert len({one.conduct.latency.median_ms for one in pis}) == 10
    assert {one.facts.arch for one in fleet} == {"aarch64", "riscv64"}
    flaky = [one for one in fleet if one.faults == ("flaky",)]
    assert 15 < len(flaky) < 35
    assert {one.conduct.cuts_per_hour for one in flaky} == {7.0}
    assert len({one.conduct.clock_offset_s for one in flaky}) == len(flaky)
    assert np.mean([one.latency_factor for one in flaky]) == pytest.approx(2, rel=0.1)


def test_a_seed_is_the_same_fleet_and_a_part_is_a_part() -> None:
    assert populate(read(FILE), 50, seed=3) == populate(read(FILE), 50, seed=3)
    assert populate(read(FILE), 50, seed=3) != populate(read(FILE), 50, seed=4)
    part = populate(of_profiles({"jetson-orin": 1}), 5, 3, first=10, prefix="lab")
    assert [one.device_id for one in part] == [f"lab-{number:05d}" for number in range(10, 15)]


def test_presets_are_faults_by_name() -> None:
    found = populate(with_faults(of_profiles({"jetson-orin": 1}), dict.fromkeys(PRESETS, 1.0)), 1, 0)
    assert found[0].faults == tuple(PRESETS)
    assert found[0].conduct.error_rate == 0.05
    assert found[0].conduct.offline is not None
    with pytest.raises(BehavioursError, match="there is no 'tired'"):
        with_faults(of_profiles({"jetson-orin": 1}), {"tired": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expected `object`"),
        ("[", "neither YAML nor JSON"),
        ("classes: []", "classes: it is empty"),
        ("clases: []", "unknown field `clases`"),
        ("classes: [{name: a}]", "give either `profile`, a shipped one, or `facts`"),
        ("classes: [{name: a, profile: pi}]", "there are android-class-arm64"),
        ("classes: [{name: a, facts: {colour: red}}]", "'colour' is no fact; there are agent_version"),
        ("classes: [{name: a, facts: {memory_mb: big}}]", "memory_mb"),
        ("classes: [{name: a, facts: {}}, {name: a, facts: {}}]", "two have the same name"),
        ("classes: [{name: a, facts: {}, error_rate: 2}]", "error_rate is 2, and must be from 0 to 1"),
        ("classes: [{name: a, facts: {}, share: 0}]", "share is 0"),
        ("classes: [{name: a, facts: {}, requests: {per_s: many}}]", r"\$.classes\[0\].requests.per_s"),
        ("classes: [{name: a, facts: {}, requests: {per_s: {normal: [1, 1], choice: [1]}}}]", "exactly one of"),
        ("classes: [{name: a, facts: {}, requests: {per_s: {lognormal: [0, 1]}}}]", "a median above 0"),
        ("classes: [{name: a, facts: {}, offline: {every_s: 1, for_s: 2}}]", "`for_s` must be above 0 and below"),
        ("classes: [{name: a, facts: {}, tags: {site: []}}]", "tags: site"),
        ("classes: [{name: a, facts: {}, tags: {site: 'p{9..1}'}}]", "from the smaller to the larger"),
        ("classes: [{name: a, facts: {}}]\nfaults: [{share: 3}]", "faults: 1: share is 3"),
        ("classes: [{name: a, facts: {}}]\neffects: [{version: m}]", "write model@version"),
        ("classes: [{name: a, facts: {}}]\neffects: [{version: m@1, crash: 2}]", "crash is 2"),
        ("classes: [{name: a, facts: {}}]\neffects: [{version: m@1, where: {class: b}}]", "no class is called 'b'"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, said: str) -> None:
    with pytest.raises(BehavioursError, match=said):
        read(text)


@pytest.mark.parametrize(("devices", "prefix"), [(5, "sim"), (50, "no spaces")])
def test_a_fleet_that_can_not_be_is_refused(devices: int, prefix: str) -> None:
    with pytest.raises(BehavioursError, match="counts are of 10 devices" if devices == 5 else "prefix"):
        populate(read(FILE), devices, 0, prefix=prefix)


def test_shares_are_exact() -> None:
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.9, 0.1]) == [6, 1]
    assert sum(shares(12_345, [0.3, 0.3, 0.4])) == 12_345


def test_durations_fall_into_the_buckets_of_the_wire() -> None:
    seconds = 10 ** np.random.default_rng(0).uniform(-8, 4, 5000)
    assert histogram(seconds) == dict(sorted(Counter(map(bucket_of, seconds.tolist())).items()))


def test_distributions_are_what_they_are_called() -> None:
    (one,) = read(
        "classes: [{name: a, facts: {}, requests: {per_s: {choice: [1, 2]}}, latency: {median_ms: {uniform: [3, 4]}}, "
        "clock_offset_s: {normal: [5, 0]}}]"
    ).classes
    chance = stream(0, 0, Purpose.TRAITS)
    assert {draw(one.requests.per_s, chance) for _ in range(50)} == {1.0, 2.0}
    assert all(3 <= draw(one.latency.median_ms, chance) <= 4 for _ in range(50))
    assert draw(one.clock_offset_s, chance) == 5.0


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://host", "write mqtt://host:port"), ("mqtt://h:x", "write mqtt")],
)
def test_a_broker_that_devices_can_not_use_is_refused(url: str, said: str) -> None:
    with pytest.raises(SimulationError, match=said):
        Simulation(url, [])
    with pytest.raises(SimulationError, match="need certificates"):
        Simulation("mqtts://host", [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile-mix", "raspberry-pi-6"], "no profile 'raspberry-pi-6'"),
        (["--profile-mix", "raspberry-pi-5=many"], "is not name=share"),
        (["--faults", "tired"], "there is no 'tired'"),
        (["--behaviours", "/nowhere/fleet.yaml"], "can't be read"),
        (["--behaviours", "x", "--profile-mix", "y"], "give either"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(options: list[str], said: str) -> None:
    shown = CliRunner().invoke(app, ["simulate", *options], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())
