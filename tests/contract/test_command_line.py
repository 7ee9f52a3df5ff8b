"""Every command explains itself within 80 columns, and the documentation names only commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from agent.protocol.manifest import Precision
from fleet_server.catalog.schemas import VariantState
from fleet_server.cli.main import app
from fleet_server.domain.strategy import StopMetric
from fleet_server.settings import Settings
from tests.cli import CliRunner
from tests.fleet import BIN

ROOT = Path(__file__).parents[2]
TREE = typer.main.get_command(app)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMAND = re.compile(r"(?:^|[`\s(])((?:shoal) [a-z][^`\n|)]*)")
_TARGET = re.compile(r"(?:`|^)make ([a-z][a-z0-9-]+)", re.MULTILINE)


def children(command: Any) -> dict[str, Any]:
    """Commands of a group; none of a plain command. (Typer carries a click of its own.)"""
    return getattr(command, "commands", {})


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in children(command).items():
        yield from commands(child, (*path, name))


EVERY = dict(commands(TREE))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: " ".join(path) or "shoal")
def test_help(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert [line for line in shown.output.splitlines() if len(line) > 80] == []
    command = EVERY[path]
    assert command.help, "no description"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{parameter.name} has no help"
    if path:
        # The first line stands in the list of the group above: it must be whole there.
        assert len(command.get_short_help_str(200)) <= 74, "the first sentence is too long for a list"


@pytest.mark.parametrize("command", ["shoal-server", "shoal-agent", "shoal-agent run", "shoal-agent facts"])
def test_help_of_the_daemons(command: str) -> None:
    name, *rest = command.split()
    environment = {**os.environ, "COLUMNS": "80"}
    shown = subprocess.run(
        [str(BIN / name), *rest, "--help"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0
    assert [line for line in shown.stdout.splitlines() if len(line) > 80] == []
    assert "xample: " in shown.stdout
    unknown = subprocess.run(
        [str(BIN / name), *rest, "--frobnicate"], capture_output=True, text=True, timeout=60, check=False
    )
    assert unknown.returncode == 2


def test_help_names_every_setting_and_every_choice() -> None:
    shown = subprocess.run(
        [str(BIN / "shoal-server"), "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for name, field in Settings.model_fields.items():
        assert f"SHOAL_{name.upper()}\n" in shown.stdout
        assert field.description, name

    def option(path: str, name: str) -> str:
        return str(next(one.help for one in EVERY[tuple(path.split())].params if name in one.opts))

    for value in Precision:
        assert value in option("profile create", "--precision")
    for metric in StopMetric:
        assert metric in option("rollout create", "--stop-when")
    for state in VariantState:
        assert state in option("variant list", "--state")


def test_commands_in_the_documents_exist() -> None:
    unknown = []
    for document in DOCUMENTS:
        for match in _COMMAND.finditer(document.read_text()):
            words = shlex.split(match[1].partition("#")[0].replace("…", "").replace("'", ""))[1:]
            path: tuple[str, ...] = ()
            for word in words:
                if (*path, word) not in EVERY:
                    break
                path = (*path, word)
            command = EVERY[path]
            rest = words[len(path) :]
            if children(command) and rest and re.fullmatch(r"[a-z-]+", rest[0]):
                unknown.append(f"{document.name}: {match[1]}")
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            unknown += [
                f"{document.name}: {match[1]}: {word}"
                for word in rest
                if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}
            ]
    assert unknown == []


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    named = {(document.name, target) for document in DOCUMENTS for target in _TARGET.findall(document.read_text())}
    assert {(name, target) for name, target in named if target not in targets} == set()
    assert len(named) > 3
