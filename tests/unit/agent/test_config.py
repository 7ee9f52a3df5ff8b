"""The agent's configuration: file, variables over it, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import Config, load_config
from agent.errors import ConfigError

FILE = """
device_id = "camera-17"
state_dir = "/tmp/agent"
broker = "mqtts://broker.example:8883"
listen = "0.0.0.0:9000"
runtimes = ["onnx"]
log_level = "debug"
tags = { site = "plant7" }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_a_file_with_everything(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, FILE), {}) == Config(
        device_id="camera-17",
        state_dir=Path("/tmp/agent"),
        broker="mqtts://broker.example:8883",
        listen="0.0.0.0:9000",
        tags={"site": "plant7"},
        runtimes=("onnx",),
        log_level="DEBUG",
    )


def test_variables_win_over_the_file(tmp_path: Path) -> None:
    variables = {"SHOAL_AGENT_BROKER": "mqtt://other:1883", "SHOAL_AGENT_TAGS": "line=3, site=plant8"}
    config = load_config(written(tmp_path, FILE), variables)
    assert config.broker == "mqtt://other:1883"
    assert config.tags == {"line": "3", "site": "plant8"}
    assert config.listen == "0.0.0.0:9000"


def test_a_device_without_an_id_keeps_the_one_it_gave_itself(tmp_path: Path) -> None:
    variables = {"SHOAL_AGENT_STATE_DIR": str(tmp_path / "state")}
    first = load_config(None, variables).device_id
    assert first.startswith("dev-")
    assert load_config(None, variables).device_id == first
    assert load_config(None, {"SHOAL_AGENT_STATE_DIR": str(tmp_path / "other")}).device_id != first


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('broker = "http://x"', "broker"),
        ('broker = "mqtt://"', "broker"),
        ('listen = "8470"', "listen"),
        ('listen = "host:99999"', "listen"),
        ("listen = 8470", "listen"),
        ('device_id = "has space"', "device_id"),
        ('device_id = "a/b"', "device_id"),
        ('device_id = "+"', "device_id"),
        ('tags = "site"', "tags"),
        ("tags = { line = 3 }", "tags"),
        ('runtimes = ["abacus"]', "runtimes"),
        ('log_level = "loud"', "log_level"),
        ('brokr = "mqtt://x"', "brokr"),
        ("this is not toml", "--config"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, named: str) -> None:
    variables = {} if line.startswith("device_id") else {"SHOAL_AGENT_DEVICE_ID": "d"}
    with pytest.raises(ConfigError, match=f"^{named}:"):
        load_config(written(tmp_path, line), variables)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config: .*nowhere.toml"):
        load_config(tmp_path / "nowhere.toml", {})
