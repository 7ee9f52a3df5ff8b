"""Profiles of real devices that come with Shoal: one YAML file each, with the source of its facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The shipped profiles, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A shipped profile, as `fleet_server.devices.schemas.ProfileCreate` takes it.

    Raises:
        KeyError: when none has that name.
    """
    import yaml

    if name not in names():
        raise KeyError(name)
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def about(name: str) -> str:
    """What a shipped profile is for: the first comment of its file."""
    return (FOLDER / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ")
