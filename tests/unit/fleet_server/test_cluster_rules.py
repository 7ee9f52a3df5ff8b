"""What builds need of workers, what machines offer, and which addresses and certificates fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from agent import __version__
from agent.protocol.facts import AcceleratorFacts, DeviceFacts
from fleet_server.conversions.cluster_task import answer_to
from fleet_server.conversions.cluster_worker import WorkerOptions, listening_host, parse_resources
from fleet_server.conversions.resources import first_met, measured_resources, missing, needs_of
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.settings import Settings

PLAIN = {"SHOAL": 1.0}
ORIN = {**PLAIN, "GPU": 1.0, "compute_capability_8.7": 1.0}
FACTS = DeviceFacts("0", "Linux", "6", "x86_64", "cpu", 4, ("avx2", "avx512_vnni"), 1024, 1024)


def spec(**fields: Any) -> ProfileSpec:
    return ProfileSpec.model_validate({"runtime": "onnx", **fields})


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, (PLAIN,)),
        ({"providers": ["openvino", "cpu"]}, (PLAIN,)),
        ({"providers": ["cuda", "cpu"]}, ({**PLAIN, "GPU": 1.0},)),
        ({"providers": ["tensorrt", "cpu"]}, ({**PLAIN, "GPU": 1.0},)),
        ({"providers": ["tensorrt"], "match": {"accelerators.compute_capability": "8.7"}}, (ORIN,)),
        ({"providers": ["cuda"], "match": {"accelerators.compute_capability": "8.7"}}, ({**PLAIN, "GPU": 1.0},)),
        (
            {"providers": ["tensorrt"], "match": {"accelerators.compute_capability": ["8.6", "8.7"]}},
            ({**PLAIN, "GPU": 1.0, "compute_capability_8.6": 1.0}, ORIN),
        ),
        ({"providers": ["tensorrt"], "resources": {}}, (PLAIN,)),
        ({"resources": {"cpu_avx512_vnni": 1}}, ({**PLAIN, "cpu_avx512_vnni": 1.0},)),
    ],
)
def test_needs(fields: dict[str, Any], needs: Any) -> None:
    assert needs_of(spec(**fields)) == needs


def test_no_amount_of_nothing() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        spec(resources={"GPU": 0})


def test_the_first_alternative_that_a_worker_has() -> None:
    other = {**ORIN, "compute_capability_9.0": 1.0}
    assert first_met((PLAIN,), []) is None
    assert first_met((ORIN, PLAIN), [PLAIN]) == PLAIN
    assert first_met((ORIN, PLAIN), [PLAIN, other]) == ORIN
    assert first_met((), [PLAIN]) == PLAIN
    assert first_met((PLAIN,), [{"GPU": 4.0}]) is None, "a worker of somebody else's"


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([], "no worker: start one with `shoal worker`"),
        ([{"GPU": 8}], "no worker: start one"),
        ([PLAIN], "no worker of 1 has GPU=1, compute_capability_8.7=1: start"),
        ([PLAIN, {**PLAIN, "GPU": 1}], "no worker of 2 has compute_capability_8.7=1: start"),
        # Each is there, but not on one machine.
        ([{**PLAIN, "compute_capability_8.7": 1}, {**PLAIN, "GPU": 1}], "has GPU=1, compute_capability_8.7=1: start"),
    ],
)
def test_what_is_missing_is_named(workers: list[dict[str, float]], words: str) -> None:
    assert words in missing((ORIN,), workers)


def test_what_a_machine_offers() -> None:
    gpus = tuple(AcceleratorFacts("cuda", "x", capability) for capability in ("8.7", "8.7", None))
    facts = msgspec.structs.replace(FACTS, accelerators=(*gpus, AcceleratorFacts("edgetpu", "Coral")))
    cpu = {"SHOAL": 1, "arch_x86_64": 1, "cpu_avx2": 1, "cpu_avx512_vnni": 1}
    assert measured_resources(FACTS) == cpu
    assert measured_resources(facts) == {**cpu, "GPU": 3, "compute_capability_8.7": 2, "edgetpu": 1}


@pytest.mark.parametrize("address", ["", "host:8786", "http://host:8786", "tcp://host", "tcp://:1", "tcp://h:99999"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValidationError, match=r"tcp://host:8786 or tls://host:8786"):
        Settings(dask_scheduler=address)


def test_tls_comes_with_its_files(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("dask_tls_ca", "dask_tls_cert", "dask_tls_key")}
    with pytest.raises(ValidationError, match=r"needs SHOAL_DASK_TLS_CA, SHOAL_DASK_TLS_CERT, SHOAL_DASK_TLS_KEY"):
        Settings(dask_scheduler="tls://host:8786")
    with pytest.raises(ValidationError, match=r"SHOAL_DASK_TLS_CA: there is no file"):
        Settings(dask_scheduler="tls://host:8786", **files)
    for path in files.values():
        path.touch()
    assert Settings(dask_scheduler="tls://host:8786", **files).effective_conversion_workers > 1
    with pytest.raises(ValidationError, match="serve a tls:// address"):
        Settings(dask_scheduler="tcp://host:8786", **files)


def test_conversions_at_once() -> None:
    assert Settings().effective_conversion_workers == 1
    assert Settings(conversion_workers=0, dask_scheduler="tcp://h:1").effective_conversion_workers == 0


@pytest.mark.parametrize(
    ("scheduler", "host", "listens"),
    [
        ("tcp://127.0.0.1:8786", None, "127.0.0.1"),
        ("tcp://localhost:8786", None, "127.0.0.1"),
        ("tcp://10.0.0.1:8786", "10.0.0.2", "10.0.0.2"),
    ],
)
def test_where_a_worker_listens(scheduler: str, host: str | None, listens: str) -> None:
    assert listening_host(WorkerOptions(scheduler, host)) == listens


def test_a_worker_is_open_to_everybody_only_by_tls_or_by_word(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="everybody who reaches this worker runs code on it"):
        listening_host(WorkerOptions("tcp://10.0.0.1:8786"))
    (tmp_path / "pem").touch()
    tls = dict.fromkeys(("tls_ca", "tls_cert", "tls_key"), tmp_path / "pem")
    assert listening_host(WorkerOptions("tls://10.0.0.1:8786", **tls)) is None
    with pytest.raises(ValueError, match="needs --tls-ca"):
        listening_host(WorkerOptions("tls://10.0.0.1:8786"))


def test_resources_by_hand() -> None:
    assert parse_resources(["GPU=2", "x=0.5"]) == {"GPU": 2.0, "x": 0.5}
    for text in ("GPU", "GPU=", "=1", "GPU=-1", "GPU=nan", "GPU=inf"):
        with pytest.raises(ValueError, match="is not NAME=AMOUNT"):
            parse_resources([text])


def test_a_worker_of_another_version_refuses(tmp_path: Path) -> None:
    request = msgspec.json.encode({"version": "99.0", "a field": "of the future"})
    answer = answer_to(request, tmp_path, "worker one", print, lambda: True)
    assert answer.error is not None
    assert answer.error.code == "worker_version"
    assert answer.error.detail == (f"worker one runs Shoal {__version__}, the server 99.0: install the same on both")
