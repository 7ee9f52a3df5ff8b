"""`shoal admin`: what is done on the server's own machine, with its settings: backups and the database's schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleet_server.cli.output import Output, OutputOption, YesOption, confirm, errors, fail, show_object

if TYPE_CHECKING:
    from fleet_server.settings import Settings

admin = typer.Typer(no_args_is_help=True, help="Backups, and the database's schema, on the server's machine.")
StateOption = Annotated[
    Path | None, typer.Option("--state-dir", help="The server's state folder. Default: SHOAL_STATE_DIR.")
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database-url", help="The server's database. Default: SHOAL_DATABASE_URL.")
]


@admin.command("backup")
def backup(
    out: Annotated[Path, typer.Option(help="Folder of all backups; each gets one of its own below it.")],
    state_dir: StateOption = None,
    database_url: DatabaseOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Back up rows, artifacts and secrets, while servers run.

    It reads the settings that the server runs with (SHOAL_* variables). Artifacts that an earlier backup in the same
    folder has are not copied again. The folder holds the fleet's keys: whoever reads it can pass for the server.

    Example: SHOAL_STATE_DIR=/var/lib/shoal shoal admin backup --out /backups
    """
    from fleet_server.backup.making import make

    with _clear_errors():
        folder, index = make(_settings(state_dir, database_url), out, lambda what: errors.print(f"{what} …"))
    errors.print(
        f"[yellow]{folder} holds the keys of the fleet's CA and of its signatures: whoever reads it can pass for the "
        "server. Keep it encrypted, and away from here.[/]"
    )
    for path in index.missing:
        errors.print(f"[yellow]missing:[/] {path}: rows speak of it, and the artifact store does not have it")
    show_object(_summary(folder, index), output)


@admin.command("restore")
def restore(
    folder: Annotated[Path, typer.Argument(help="One backup: a folder with a backup.json.")],
    state_dir: StateOption = None,
    database_url: DatabaseOption = None,
    yes: YesOption = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a server out of a backup, where there is none.

    Everything is verified first, and nothing that is there is overwritten. What devices have seen since the backup is
    gone past, so that they follow again: docs/operations.md says what that can't bring back.

    Example: SHOAL_STATE_DIR=/var/lib/shoal shoal admin restore /backups/20261129T104800Z
    """
    from fleet_server.backup.restoring import restore

    settings = _settings(state_dir, database_url)
    confirm(f"Restore {folder} into {settings.state_dir}? Its server must not run.", yes=yes)
    with _clear_errors():
        done = restore(settings, folder, lambda what: errors.print(f"{what} …"))
    for path in done.missing:
        errors.print(f"[yellow]missing:[/] {path}: the backup does not have it either")
    for fleet in done.offline:
        errors.print(
            f"[yellow]fleet {fleet}:[/] its root keys are not here. Devices take nothing new until "
            "`shoal trust rotate snapshot` and `shoal trust rotate timestamp` are done with them"
        )
    errors.print("devices that were locked out after the backup are not locked out any more: lock them out again")
    show_object(_summary(folder, done.index), output)


@admin.command("migrate")
def migrate(
    check: Annotated[  # noqa: FBT002
        bool, typer.Option("--check", help="Only say what would be done; exit 1 when servers must be stopped for it.")
    ] = False,
    to: Annotated[
        str | None, typer.Option("--to", help="Bring it back to this revision; what only later ones know is lost.")
    ] = None,
    state_dir: StateOption = None,
    database_url: DatabaseOption = None,
    yes: YesOption = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Bring the database to this release's schema, or back to an earlier one.

    A server does so at its start. Migrations of a release only add, so that servers of the release before go on beside
    it; where one does not, --check says so.

    Example: shoal admin migrate --check
    """
    from fleet_server import migrations

    settings = _settings(state_dir, database_url)
    url = settings.effective_database_url
    with _clear_errors():
        found = migrations.plan(url)
        known = {
            "revision": found.current,
            "of_this_release": migrations.head(),
            "pending": list(found.pending),
            "servers_must_stop": bool(found.contracts),
        }
        if to is not None:
            if to not in migrations.revisions():
                raise fail(f"--to: {to!r} is no revision; there are {', '.join(migrations.revisions())}", 2)
            confirm(f"Bring the database from {found.current} to {to}? Back it up first.", yes=yes)
            migrations.downgrade(url, to)
            known["revision"] = to
        elif not check:
            migrations.upgrade(url)
            known["revision"] = migrations.plan(url).current
    show_object(known, output)
    if check and found.contracts:
        raise typer.Exit(1)


def _summary(folder: Path, index: Any) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "made_at": index.made_at,
        "version": index.version,
        "revision": index.revision,
        "rows": sum(index.rows.values()),
        "artifacts": len(index.artifacts),
        "artifact_bytes": sum(index.artifacts.values()),
        "missing": len(index.missing),
    }


def _settings(state_dir: Path | None, database_url: str | None) -> Settings:
    from pydantic import ValidationError

    from fleet_server.settings import Settings

    given = {"state_dir": state_dir, "database_url": database_url}
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = f"SHOAL_{str(first['loc'][0]).upper()}: " if first["loc"] else ""
        raise fail(f"{name}{first['msg'].removeprefix('Value error, ')}", 2) from None


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What can't be done, as a sentence and an exit code."""
    from sqlalchemy.exc import SQLAlchemyError

    from fleet_server.errors import ConflictError, FleetError

    try:
        yield
    except FleetError as error:
        raise fail(error.detail, 5 if isinstance(error, ConflictError) else 1) from None
    except SQLAlchemyError as error:
        raise fail(f"the database does not answer ({str(error)[:300]}): see SHOAL_DATABASE_URL") from None
