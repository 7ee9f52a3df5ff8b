"""A table of the configuration file, whose keys are taken out as they are read: what is left is misspelt."""

from __future__ import annotations

import math
from typing import Any

from agent.errors import ConfigError
from agent.protocol.topics import check_device_id

MOST_TEXTS = 16


class Table:
    """One table.

    Args:
        name: as errors name it, such as `sources`, or `pipelines[door].source`.
        values: as the file has them.

    Raises:
        ConfigError: when it is no table; so do all methods, naming the key and the remedy.
    """

    def __init__(self, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: must be a table, such as [{name}]")
        self.name = name
        self._values = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        """A value of any kind."""
        return self._values.pop(key, default)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self._values.pop(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.name}.{key}: must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._values.pop(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.name}.{key}: must be text in quotes")
        return value

    def identifier(self, key: str, default: str) -> str:
        """A name that may stand in paths: it has the characters of a device's id."""
        value = self.text(key, default)
        try:
            return check_device_id(value)
        except ValueError:
            raise ConfigError(
                f"{self.name}.{key}: {value[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'"
            ) from None

    def texts(self, key: str, most: int = MOST_TEXTS) -> list[str]:
        """A list of texts; empty when absent."""
        value = self._values.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(value) > most:
            raise ConfigError(f"{self.name}.{key}: must be a list of at most {most} texts")
        return value

    def number(self, key: str, default: float, most: float) -> float:
        """A number above 0."""
        value = self._values.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ConfigError(f"{self.name}.{key}: {value!r} is not a number above 0 and up to {most:g}")
        return float(value)

    def amount(self, key: str, default: float, most: float) -> float:
        """A number that may be 0."""
        value = self._values.pop(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not 0 <= value <= most:
            raise ConfigError(f"{self.name}.{key}: {value!r} is not a number from 0 to {most:g}")
        return float(value)

    def whole(self, key: str, default: int, most: int) -> int:
        """A whole number above 0."""
        value = self._values.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ConfigError(f"{self.name}.{key}: {value!r} is not a whole number from 1 to {most}")
        return value

    def refuse_rest(self) -> None:
        """What was not read is no key."""
        for key in self._values:
            raise ConfigError(f"{self.name}.{key}: there is no such key; docs/operations.md lists them")
