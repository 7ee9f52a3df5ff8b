"""The locks hold what constraints.txt pins, each file by its hash, and an agent's holds nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy" / "locks"
REMEDY = "run `make lock`"


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def lock(name: str) -> str:
    return (LOCKS / f"{name}.lock").read_text()


def constraints() -> dict[str, str]:
    return pins((ROOT / "constraints.txt").read_text())


def test_the_development_lock_is_what_is_pinned() -> None:
    pinned = constraints()
    assert pinned.pop("torch")
    assert pins(lock("dev")) == pinned, REMEDY


@pytest.mark.parametrize("name", ["agent", "server", "server-convert"])
def test_what_runs_is_what_was_tested(name: str) -> None:
    other = {key: version for key, version in pins(lock(name)).items() if constraints().get(key, version) != version}
    assert other == {}, REMEDY


@pytest.mark.parametrize("name", ["agent", "server", "server-convert", "dev"])
def test_every_package_has_hashes(name: str) -> None:
    parts = re.split(r"^(?=[A-Za-z0-9._-]+==)", lock(name), flags=re.MULTILINE)[1:]
    assert parts
    assert [part.partition(" ")[0] for part in parts if "--hash=sha256:" not in part] == []


def test_an_agent_is_made_of_little() -> None:
    heavy = {"torch", "pydantic", "fastapi", "sqlalchemy", "onnx", "typer", "httpx"}
    assert heavy.isdisjoint(pins(lock("agent")))
    assert "torch" not in pins(lock("server-convert")), "the server's package converts without it"
