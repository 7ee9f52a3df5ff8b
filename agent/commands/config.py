"""Which commands of the server the device's owner allows, as the configuration says: table `[commands]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.errors import ConfigError
from agent.protocol.commands import CommandKind
from agent.tables import Table

PROGRAM_TEXTS = 32


@dataclass(frozen=True)
class CommandConfig:
    """What is allowed.

    Attributes:
        refused: commands that are not carried out here.
        identify_program: program and arguments that `identify` runs; empty for none.
    """

    refused: frozenset[CommandKind] = field(default_factory=frozenset)
    identify_program: tuple[str, ...] = ()

    @property
    def allowed(self) -> dict[str, bool]:
        """By the name of each command, whether it is carried out here."""
        return {kind.value: kind not in self.refused for kind in CommandKind}


def read_commands(values: Any) -> CommandConfig:
    """Read the table: a command is carried out unless its key, its name with `_` for `-`, is false.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    table = Table("commands", values)
    kinds = {kind: table.flag(kind.value.replace("-", "_"), default=True) for kind in CommandKind}
    program = tuple(table.texts("identify_program", PROGRAM_TEXTS))
    if program and not program[0]:
        raise ConfigError('commands.identify_program: its first text names no program, such as "/usr/local/bin/blink"')
    table.refuse_rest()
    return CommandConfig(frozenset(kind for kind, allowed in kinds.items() if not allowed), program)
