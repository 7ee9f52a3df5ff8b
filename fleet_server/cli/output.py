"""How the command line prints: tables for people, JSON for machines, one clear sentence for errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from fleet_server.cli import oidc
from fleet_server.openid import ProviderError
from fleet_server.sdk import ApiError, AuthError, ChangedError, Client, ConflictError, NotFoundError

Json = dict[str, Any]
WHOLE_WIDTH = 120  # characters that tables with many figures need; in fewer their columns stand below each other


class Output(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("-o", "--output", help="How to print: for people or for machines.")]
QueryOption = Annotated[
    str | None,
    typer.Option("-q", "--query", help='Devices it holds for, in RSQL: "site==plant7;memory_mb>=2048", "id==cam-*".'),
]
IfMatchOption = Annotated[
    str | None,
    typer.Option("--if-match", help="Only where it still is what this etag stood for, as `show` printed it."),
]
YesOption = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask first.")]
errors = Console(stderr=True, highlight=False)


@contextmanager
def client(context: typer.Context) -> Iterator[Client]:
    """The client for the URL and token the user gave; its errors become exit codes."""
    url, given = context.obj["url"], context.obj
    try:
        token = given["token"] or oidc.current_token(url)
    except ProviderError as error:
        raise fail(str(error), 3) from None
    with exit_codes(), Client(url, token, fleet=given["fleet"], ca_file=given["ca_file"]) as found:
        yield found


@contextmanager
def exit_codes() -> Iterator[None]:
    """1 failed, 3 not authenticated or not allowed, 4 not found, 5 conflict; the sentence goes to standard error."""
    try:
        yield
    except ApiError as error:
        errors.print(f"[red]error:[/] {_escaped(error.detail)}")
        for problem in error.problems:
            if problem["detail"] not in error.detail:
                errors.print(f"  {_escaped(problem['field'])}: {_escaped(problem['detail'])}")
        code = {AuthError: 3, NotFoundError: 4, ConflictError: 5, ChangedError: 5}.get(type(error), 1)
        raise typer.Exit(code) from None


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that can't be undone; where nobody can answer, `--yes` is needed."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise fail(f"{question} Say --yes: nobody is here to ask", 2)
    if not typer.confirm(question, err=True):
        raise fail("nothing was changed")


def show_rows(
    rows: Iterable[Json], output: Output, columns: Sequence[tuple[str, Callable[[Json], object]]], *, empty: str
) -> None:
    """A list: a table that fits the terminal, or a JSON array."""
    found = list(rows)
    if output is Output.JSON:
        print_json(found)
        return
    if not found:
        errors.print(empty)
        return
    Console().print(rows_table(found, columns))


def show_fitting(made: Callable[[int], RenderableType]) -> None:
    """Print what is made for a terminal of so many characters."""
    console = Console()
    console.print(made(console.width))


def rows_table(rows: Iterable[Json], columns: Sequence[tuple[str, Callable[[Json], object]]]) -> Table:
    """The table of a list."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, (name, _) in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=number == 0)  # the first names the row: it stays whole
    for row in rows:
        table.add_row(*[_cell(value(row)) for _, value in columns])
    return table


def show_object(value: Json, output: Output) -> None:
    """One thing: its fields a line each, or a JSON object."""
    if output is Output.JSON:
        print_json(value)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, one in value.items():
        table.add_row(name.replace("_", " "), _cell(one))
    Console().print(table)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def fail(message: str, code: int = 1) -> typer.Exit:
    """An error that was found here: its sentence is printed, its exit is to be raised."""
    errors.print(f"[red]error:[/] {_escaped(message)}")
    return typer.Exit(code)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        return _escaped(json.dumps(value)) if value else "–"
    return _escaped(str(value))


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def waits(waiting: Json) -> str:
    """What something waits for, and until when."""
    until = waiting["until"]
    return f"waiting: {waiting['detail']}" + (f"; goes on at {until[:16].replace('T', ' ')} UTC" if until else "")
