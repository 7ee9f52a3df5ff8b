"""`shoal profile`: kinds of device."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleet_server.cli.documents import read_document
from fleet_server.cli.output import (
    IfMatchOption,
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    fail,
    show_object,
    show_rows,
)
from fleet_server.devices import shipped
from fleet_server.sdk import segment

if TYPE_CHECKING:
    from fleet_server.devices.schemas import ProfileCreate

profile = typer.Typer(no_args_is_help=True, help="Profiles: kinds of device, by a match over their facts.")
RateOption = Annotated[str | None, typer.Option(help='At most so much a second to each device, such as "2 MB/s".')]
BudgetOption = Annotated[
    list[str],
    typer.Option(
        help='kind=bytes per period, such as "cellular=50 MB per day"; ethernet, wifi, cellular, metered; repeat.'
    ),
]
DownloadOption = Annotated[
    list[str], typer.Option(help='When it may be downloaded, such as "Mon-Fri 22:00-04:00 Europe/Berlin"; repeat.')
]
ActivateOption = Annotated[list[str], typer.Option(help="When it may begin to serve, written alike; repeat.")]
NameArgument = Annotated[str, typer.Argument(help="Its name.")]
# The most telling first: one of them becomes a condition of a detected profile.
TELLING = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm", "asimddp", "asimd", "neon")


@profile.command("list")
def list_profiles(
    context: typer.Context,
    come: Annotated[bool, typer.Option("--shipped", help="Those that come with Shoal instead.")] = False,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """List profiles."""
    if come:
        rows = [{**shipped.load(name), "for": shipped.about(name)} for name in shipped.names()]
        wanted = [("profile", lambda row: row["name"]), ("for", lambda row: row["for"])]
        show_rows(rows, output, wanted, empty="none came with this installation")
        return
    with client(context) as api:
        show_rows(
            api.items("/profiles"),
            output,
            [
                ("profile", lambda row: row["name"]),
                ("runtime", lambda row: row["spec"]["runtime"]),
                ("precisions", lambda row: ", ".join(row["spec"]["precisions"])),
                ("match", lambda row: row["spec"]["match"]),
            ],
            empty="there is no profile yet; create one with `shoal profile create`",
        )


@profile.command("show")
def show_profile(context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one profile, with how many devices have it."""
    with client(context) as api:
        found, etag = api.get_tagged(f"/profiles/{segment(name)}")
        found["etag"] = etag
        show_object(found if output is Output.JSON else {**found, **found.pop("spec")}, output)


@profile.command("create")
def create_profile(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Its name; may stand in the file.")] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", help="YAML or JSON of a profile; - reads it from input.")
    ] = None,
    come: Annotated[str | None, typer.Option("--shipped", help="Begin with this shipped profile.")] = None,
    runtime: Annotated[str | None, typer.Option(help="onnx, litert, torch, or one that a package brings.")] = None,
    match: Annotated[list[str], typer.Option(help="fact=value that must hold; repeat.")] = [],  # noqa: B006
    precision: Annotated[
        list[str],
        typer.Option(help="fp32, fp16, int8, dynamic-int8, int16, weight-int8 or weight-int4; repeat."),
    ] = [],  # noqa: B006
    allow_unknown_runtime: Annotated[  # noqa: FBT002
        bool, typer.Option("--allow-unknown-runtime", help="No device reports its runtime yet.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a profile from a file, from options, or from both (options win).

    Example: shoal profile create rpi4 --runtime litert --match arch=aarch64 --precision int8

    Example: shoal profile detect | shoal profile create -f -
    """
    wanted: dict[str, Any] = _shipped(come) if come else {}
    wanted |= _read(file) if file else {}
    if name:
        wanted["name"] = name
    if runtime:
        wanted["runtime"] = runtime
    if match:
        wanted["match"] = pairs(match, "--match")
    if precision:
        wanted["precisions"] = precision
    if allow_unknown_runtime:
        wanted["allow_unknown_runtime"] = True
    with client(context) as api:
        show_object(api.post("/profiles", wanted), output)


@profile.command("delivery")
def change_delivery(
    context: typer.Context,
    name: NameArgument,
    rate: RateOption = None,
    budget: BudgetOption = [],  # noqa: B006
    download: DownloadOption = [],  # noqa: B006
    activate: ActivateOption = [],  # noqa: B006
    clear: Annotated[bool, typer.Option("--clear", help="Let artifacts come as they like.")] = False,  # noqa: FBT002
    if_match: IfMatchOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Say how artifacts may come to the devices of a profile.

    What is not given is not bounded.

    Example: shoal profile delivery rpi4 --budget "cellular=50 MB per day" --download "Mon-Fri 22:00-04:00"
    """
    wanted = delivery(rate, budget, download, activate)
    if clear == bool(wanted):
        raise fail("give --rate, --budget, --download or --activate, or else --clear", 2)
    with client(context) as api:
        show_object(api.patch(f"/profiles/{segment(name)}", {"delivery": wanted}, if_match=if_match), output)


def delivery(rate: str | None, budgets: list[str], download: list[str], activate: list[str]) -> dict[str, Any] | None:
    """The options as a delivery policy; None where none was given."""
    wanted: dict[str, Any] = {"rate": rate} if rate else {}
    wanted |= {"budgets": pairs(budgets, "--budget")} if budgets else {}
    wanted |= {"download": download} if download else {}
    wanted |= {"activate": activate} if activate else {}
    return wanted or None


@profile.command("delete")
def delete_profile(context: typer.Context, name: NameArgument, yes: YesOption = False) -> None:  # noqa: FBT002
    """Delete a profile that no variant was built for."""
    confirm(f"delete profile {name}?", yes=yes)
    with client(context) as api:
        api.delete(f"/profiles/{segment(name)}")


@profile.command("detect")
def detect_profile(output: OutputOption = Output.TABLE) -> None:
    """Print the profile of this machine, as YAML.

    `shoal profile create -f` takes it. Which shipped profiles fit this machine is said on standard error.
    """
    import msgspec
    import yaml

    from agent.hardware import measure
    from fleet_server.devices.matching import NamedProfile, matches
    from fleet_server.devices.schemas import ProfileCreate

    facts = msgspec.to_builtins(measure(Path(), tags={}))
    found = detected(facts)
    fitting = []
    for name in shipped.names():
        spec = NamedProfile(name, name, ProfileCreate.model_validate(shipped.load(name))).spec
        if matches(facts, spec):
            fitting.append((len(spec.match), name))
    names = [name for _, name in sorted(fitting, reverse=True)]
    errors.print(f"shipped profiles that fit, the closest first: {', '.join(names) or 'none'}")
    sys.stdout.write(
        json.dumps(found, indent=2) + "\n" if output is Output.JSON else yaml.safe_dump(found, sort_keys=False)
    )


def detected(facts: dict[str, Any]) -> dict[str, Any]:
    """A profile for machines like the one with these facts (`agent.protocol.facts.DeviceFacts` as a dictionary)."""
    from agent.protocol.manifest import OLD_LITERT, OLD_LITERT_PRECISIONS

    runtimes = {one["name"]: one for one in facts["runtimes"]}
    runtime = next((one for one in ("onnx", "litert", "torch") if one in runtimes), "litert")
    telling = next((one for one in TELLING if one in facts["cpu_features"]), None)
    match: dict[str, Any] = {"arch": facts["arch"]}
    if telling:
        match["cpu_features"] = telling
    providers, precisions = ["cpu"], ["fp32", "int8", "dynamic-int8"]
    available = runtimes.get("onnx", {}).get("providers", ())
    for accelerator in facts["accelerators"]:
        match["accelerators.kind"] = accelerator["kind"]
        if accelerator.get("compute_capability"):
            match["accelerators.compute_capability"] = accelerator["compute_capability"]
    if "cuda" in available and match.get("accelerators.kind") == "cuda":
        providers = [*(one for one in ("tensorrt", "cuda") if one in available), "cpu"]
        precisions = ["fp32", "fp16", "int8"]
    if runtime == "litert" and runtimes.get("litert", {}).get("package") == OLD_LITERT:
        match["runtimes.litert.package"] = OLD_LITERT
        precisions = [one.value for one in OLD_LITERT_PRECISIONS]
    match["memory_mb"] = {"min": 1 << max(8, (facts["memory_mb"] * 3 // 4).bit_length() - 1)}
    words = re.sub(r"[^a-z0-9]+", "-", f"{facts['arch']}-{telling or 'plain'}-{runtime}".lower()).strip("-")
    return {"name": words, "match": match, "runtime": runtime, "providers": providers, "precisions": precisions}


def read_profile(name_or_file: str) -> ProfileCreate:
    """A profile by the name of a shipped one, or from a file."""
    from pydantic import ValidationError

    from fleet_server.devices.schemas import ProfileCreate

    known = name_or_file in shipped.names()
    wanted = shipped.load(name_or_file) if known else _read(name_or_file)
    try:
        return ProfileCreate.model_validate({"name": Path(name_or_file).stem, **wanted})
    except ValidationError as error:
        first = error.errors()[0]
        raise fail(f"--profile: {'.'.join(map(str, first['loc']))}: {first['msg']}", 2) from None


def pairs(values: list[str], what: str) -> dict[str, str]:
    """key=value texts as a dictionary."""
    found = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise fail(f"{what}: {value!r} is not key=value", 2)
        found[key] = rest
    return found


def _shipped(name: str) -> dict[str, Any]:
    try:
        return shipped.load(name)
    except KeyError:
        raise fail(f"--shipped: there is no {name!r}; there are {', '.join(shipped.names())}", 2) from None


def _read(file: str) -> dict[str, Any]:
    known = ", ".join(shipped.names())
    return read_document(file, "profile", f", and no shipped profile is called so: {known}")
