"""`shoal agent-release`: releases of the agent, which devices become by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_server.cli.models import upload_file
from fleet_server.cli.output import Output, OutputOption, YesOption, client, confirm, show_object, show_rows
from fleet_server.sdk import segment

agent_release = typer.Typer(no_args_is_help=True, help="Releases of the agent, which devices become by themselves.")
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="The release's version.")]


@agent_release.command("push")
def push(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle that `make agent-release` made.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Push a bundle of a release of the agent; a release has one a platform.

    Then roll it out: shoal rollout create shoal-agent@0.2.0 --all

    Example: shoal agent-release push dist/shoal-agent-0.2.0-linux-x86_64-glibc-cp311.shoal-release
    """
    with client(context) as api:
        _show(api.post("/agent-releases", {"digest": upload_file(api, file)}), output)


@agent_release.command("list")
def list_releases(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List releases of the agent, newest first."""
    with client(context) as api:
        show_rows(
            api.items("/agent-releases"),
            output,
            [
                ("release", lambda row: row["reference"]),
                ("platforms", lambda row: ", ".join(one["platform"] for one in row["bundles"])),
                ("signed", lambda row: all(one["signed"] for one in row["bundles"])),
                ("devices", lambda row: row["devices"]),
                ("created", lambda row: row["created_at"][:16].replace("T", " ")),
            ],
            empty="there is none yet; make one with `make agent-release`, push it with `shoal agent-release push`",
        )


@agent_release.command("show")
def show(context: typer.Context, version: VersionArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one release of the agent: its bundles, and how many devices run it."""
    with client(context) as api:
        _show(api.get(f"/agent-releases/{segment(version)}"), output)


@agent_release.command("delete")
def delete(context: typer.Context, version: VersionArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a release of the agent that was never rolled out."""
    confirm(f"delete release {version} of the agent?", yes=yes)
    with client(context) as api:
        api.delete(f"/agent-releases/{segment(version)}")


def _show(found: dict[str, Any], output: Output) -> None:
    if output is Output.TABLE:
        bundles = "\n".join(
            f"{one['platform']}  {one['size'] / 2**20:.1f} MiB, {one['unpacked'] / 2**20:.1f} MiB unpacked  "
            f"{one['digest'][:16]}{'' if one['signed'] else '  waits for a signature: shoal trust sign'}"
            for one in found["bundles"]
        )
        found = {**found, "bundles": bundles}
    show_object(found, output)
