"""`shoal bundle`: models for devices that no server reaches, as one file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from agent.protocol.bundle import END, INDEX, SUFFIX, BundleArtifact, BundleFile, BundleIndex, padding, write_header
from fleet_server.cli.output import Json, Output, OutputOption, client, fail, show_object
from fleet_server.sdk import Client, segment

bundle = typer.Typer(no_args_is_help=True, help="Bundles: models for devices that no server reaches, as one file.")


@bundle.command("export")
def export(
    context: typer.Context,
    references: Annotated[list[str], typer.Argument(metavar="MODEL@VERSION...", help="What devices are to run.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(f"models{SUFFIX}"),
    profile: Annotated[list[str], typer.Option(help="For this profile; repeat. Default: all with a variant.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="Of the order: devices follow the one of their configuration.")] = "default",
    probation: Annotated[float | None, typer.Option(help="Seconds that devices watch it.")] = None,
    allow_unproven: Annotated[bool, typer.Option(help="Also variants that no device has measured.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Write models for devices that no server reaches into a file.

    It holds artifacts, their signed manifests, a signed order, and the TUF metadata that vouches for them.

    The order replaces an earlier one of its name: what it does not list is taken off devices that follow it. On the
    device: shoal-agent bundle import, or a stick in the folder that its configuration names (docs/operations.md).

    Example: shoal bundle export mnist@2 --profile rpi5-litert --name line-a --out line-a.shoal-bundle
    """
    wanted = {
        "versions": references,
        "profiles": profile,
        "name": name,
        "probation_s": probation,
        "allow_unproven": allow_unproven,
    }
    if out.suffix != SUFFIX:
        raise fail(f"--out: {out} does not end in {SUFFIX}, and devices look for files that do", 2)
    with client(context) as api:
        found = api.post("/bundles", wanted)
        if not found["signed"]:
            waits = f"the order {name!r}, serial {found['serial']}, waits for signatures"
            raise fail(f"{waits}: `shoal trust sign`, then this again", 5)
        try:
            size = _write(api, found, out)
        except OSError as error:
            raise fail(f"{out} can't be written: {error.strerror}") from None
    shown = {"file": str(out), "bytes": size, "order": found["name"], "serial": found["serial"]}
    show_object(shown | {"artifacts": [one["digest"] for one in found["artifacts"]]}, output)


def _write(api: Client, found: Json, out: Path) -> int:
    """The file, whole or not at all."""
    files = [(one["file"], one["body"].encode()) for one in found["metadata"]]
    index = BundleIndex(
        format=1,
        fleet=found["fleet"],
        made_at=time.time(),
        order=msgspec.Raw(found["order"].encode()),
        manifests=tuple(msgspec.Raw(one.encode()) for one in found["manifests"]),
        metadata=tuple(BundleFile(file, len(body)) for file, body in files),
        artifacts=tuple(BundleArtifact(one["digest"], one["size"]) for one in found["artifacts"]),
    )
    members = {INDEX: msgspec.json.encode(index)}
    members |= {f"metadata/{number}": body for number, (_, body) in enumerate(files)}
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            for name, body in members.items():
                file.write(write_header(name, len(body), index.made_at) + body + bytes(padding(len(body))))
            for one in index.artifacts:
                file.write(write_header(f"artifacts/{one.digest}", one.size, index.made_at))
                _download(api, one, file.write)
                file.write(bytes(padding(one.size)))
            file.write(END)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out.stat().st_size


def _download(api: Client, artifact: BundleArtifact, write: Callable[[bytes], object]) -> None:
    seen = hashlib.sha256()

    def take(piece: bytes) -> None:
        seen.update(piece)
        write(piece)

    api.download(f"/artifacts/{segment(artifact.digest)}", take)
    if seen.hexdigest() != artifact.digest:
        raise fail(f"the server's copy of {artifact.digest[:12]} is damaged: push the version again")
