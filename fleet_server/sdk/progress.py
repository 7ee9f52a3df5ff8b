"""Progress bars of what the SDK waits for: on a terminal and in a notebook, nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bars(Protocol):
    """Where progress is told."""

    def tell(self, name: str, fraction: float | None = None, said: str = "") -> None:
        """How far something is, 0 to 1, and what it does; None where nobody knows how far."""


class _Silent:
    def tell(self, name: str, fraction: float | None = None, said: str = "") -> None:
        """Nobody looks."""


@contextmanager
def bars(*, shown: bool | None = None) -> Iterator[Bars]:
    """Bars that vanish at the end.

    Args:
        shown: None: where somebody can see them.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if shown is False or (shown is None and not (console.is_terminal or console.is_jupyter)):
        yield _Silent()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        class Shown:
            def tell(self, name: str, fraction: float | None = None, said: str = "") -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=None if fraction is None else 1.0, said=said)
                total = None if fraction is None else 1.0
                progress.update(tasks[name], total=total, completed=fraction or 0.0, said=said)

        yield Shown()
