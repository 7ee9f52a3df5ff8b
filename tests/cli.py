"""Commands of `shoal` within the process of a test: quicker than a process of their own."""

from __future__ import annotations

from functools import cache

from typer import testing
from typer.testing import CliRunner, Result

__all__ = ["CliRunner", "Result"]

# The runner builds the tree of all commands anew for each one that it runs, which takes longer than most of them.
testing._get_command = cache(testing._get_command)
