"""The agent's configuration: a TOML file, overridden by `SHOAL_AGENT_*` variables; frozen, read once."""

from __future__ import annotations

import hashlib
import os
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.errors import ConfigError
from agent.protocol.topics import check_device_id

PREFIX = "SHOAL_AGENT_"
KEYS = ("device_id", "state_dir", "broker", "listen", "unix_socket", "tags", "runtimes", "log_level", "ca_file")


@dataclass(frozen=True)
class Config:
    """Everything that can be set.

    Attributes:
        device_id: this device's name in the fleet.
        state_dir: artifacts, journal, spool.
        broker: `mqtt://[user:password@]host:port` or `mqtts://…`.
        listen: `host:port` of the local inference API.
        unix_socket: path of its Unix socket; empty for none.
        tags: what this device says of itself, for profiles to match.
        runtimes: the only ones to use; empty for all that import.
        log_level: DEBUG, INFO, WARNING or ERROR.
        ca_file: certificates that the broker's is checked against; empty for the system's.
    """

    device_id: str
    state_dir: Path
    broker: str = "mqtt://127.0.0.1:7471"
    listen: str = "127.0.0.1:8470"
    unix_socket: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    runtimes: tuple[str, ...] = ()
    log_level: str = "INFO"
    ca_file: str = ""


def load_config(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the configuration.

    Args:
        path: of the TOML file; None for variables only.
        environment: such as `os.environ`.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    values = _file(path) if path else {}
    for key in KEYS:
        if PREFIX + key.upper() in environment:
            values[key] = _from_text(key, environment[PREFIX + key.upper()])
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such key; there are {', '.join(KEYS)}")
    state_dir = Path(_text(values, "state_dir", "/var/lib/shoal-agent"))
    try:
        device_id = check_device_id(_text(values, "device_id", "") or kept_device_id(state_dir))
    except ValueError as error:
        raise ConfigError(f"device_id: {error}") from None
    except OSError as error:
        raise ConfigError(f"state_dir: {state_dir} can't be written: {error}") from None
    return Config(
        device_id=device_id,
        state_dir=state_dir,
        broker=_url(_text(values, "broker", Config.broker)),
        listen=_address(_text(values, "listen", Config.listen)),
        unix_socket=_text(values, "unix_socket", ""),
        tags=_tags(values.get("tags", {})),
        runtimes=_runtimes(values.get("runtimes", [])),
        log_level=_level(_text(values, "log_level", "INFO")),
        ca_file=_text(values, "ca_file", ""),
    )


def kept_device_id(state_dir: Path) -> str:
    """The id this device gave itself: made once from the machine's id (hashed, as that is meant to stay private)."""
    path = state_dir / "device-id"
    if path.exists():
        return path.read_text().strip()
    machine = Path("/etc/machine-id")
    seed = machine.read_text().strip() if machine.exists() else uuid.uuid4().hex
    device_id = "dev-" + hashlib.sha256(f"shoal:{seed}:{state_dir}".encode()).hexdigest()[:12]
    state_dir.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(device_id + "\n")
    part.replace(path)
    return device_id


def _file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config: {path} can't be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config: {path} is not TOML: {error}") from None


def _from_text(key: str, text: str) -> Any:
    if key == "tags":
        pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
        return {name.strip(): value.strip() for name, _, value in pairs}
    return [part.strip() for part in text.split(",") if part.strip()] if key == "runtimes" else text


def _text(values: Mapping[str, Any], key: str, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key}: must be text in quotes")
    return value


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname:
        raise ConfigError(f"broker: {value!r} is not mqtt://host:port or mqtts://host:port")
    return value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"listen: {value!r} is not host:port, such as 127.0.0.1:8470")
    return value


def _tags(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError('tags: must be a table of texts, such as { site = "plant7" }')
    return {str(key): str(one) for key, one in value.items()}


def _runtimes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not set(map(str, value)) <= {"onnx", "litert"}:
        raise ConfigError('runtimes: must be a list of "onnx" and "litert"')
    return tuple(value)


def _level(value: str) -> str:
    if value.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise ConfigError(f"log_level: {value!r} is not DEBUG, INFO, WARNING or ERROR")
    return value.upper()
