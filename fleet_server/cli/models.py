"""`shoal model` and `shoal variant`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from agent.protocol.processing import Processing
from agent.protocol.processing_rules import ProcessingError, read
from fleet_server.cli.candidates import plot, table
from fleet_server.cli.compress import pruned_share
from fleet_server.cli.documents import read_document
from fleet_server.cli.drift import version_drift
from fleet_server.cli.output import (
    Json,
    Output,
    OutputOption,
    YesOption,
    client,
    confirm,
    errors,
    fail,
    print_json,
    show_fitting,
    show_object,
    show_rows,
)
from fleet_server.cli.shards import shard, shards, show_shards, unshard
from fleet_server.sdk import Client, segment

model = typer.Typer(no_args_is_help=True, help="Models: push versions, see what there is.")
model.command("drift")(version_drift)
model.command("shard")(shard)
model.command("shards")(shards)
model.command("shards-show")(show_shards)
model.command("unshard")(unshard)
variant = typer.Typer(no_args_is_help=True, help="Variants: versions converted for profiles, measured and gated.")
FORMATS = {".onnx": "onnx", ".tflite": "tflite"}
UNSAFE = {".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt"}


@model.command("push")
def push(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="What to call it, such as mnist@1.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="model.onnx and/or model.tflite, or net.py:function.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors for net.py:function, or for --architecture.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="A net that is registered on the server, which makes the files of --weights.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Rows for static int8: an .npz with an array for each input.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Held-out rows, as .npz, with their class indices as `y`.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="Rows to train on, as .npz, with their targets as `y`: for --architecture.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    processing: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML or JSON: how images become inputs (`shoal model processing-schema`)."),
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Lowest accuracy the gate lets pass, 0 to 1.")] = None,
    max_regression: Annotated[
        float, typer.Option(help="Points of accuracy it may lose against the version before.")
    ] = 2.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Push a version of a model: its files and its data sets.

    A torch net is exported on this machine: net.py runs here, with your rights, and the server never sees it.
    With --architecture the server makes the files, by code that is installed there (`shoal model architectures`).
    Example: shoal model push mnist@1 net.py:build --weights w.safetensors --evaluation e.npz
    """
    name, _, version = reference.partition("@")
    if not name or not version:
        raise fail(f"{reference!r} is not MODEL@VERSION", 2)
    declared = read_processing(processing) if processing else None
    with client(context) as api, tempfile.TemporaryDirectory() as folder:
        if architecture is None:
            files = source_files(sources or [], weights, evaluation or calibration, Path(folder), processing=declared)
        else:
            files = _weights_alone(sources, weights)
        body: dict[str, Any] = {
            "architecture": architecture,
            "training": upload_file(api, training) if training else None,
            "name": version,
            "sources": [{"format": form, "digest": upload_file(api, path)} for form, path in files.items()],
            "calibration": upload_file(api, calibration) if calibration else None,
            "evaluation": upload_file(api, evaluation) if evaluation else None,
            "labels": _lines(labels) if labels else [],
            "gate": {"min_accuracy": min_accuracy, "max_regression_points": max_regression},
            "processing": msgspec.to_builtins(declared),
        }
        with errors.status("the server checks the version"):
            created = api.post(f"/models/{segment(name)}/versions", body, timeout_s=600)
        if output is Output.TABLE:
            errors.print(f"{created['reference']} is there; build variants with `shoal variant build {reference}`")
        show_object(created, output)


def _weights_alone(sources: list[str] | None, weights: Path | None) -> dict[str, Path]:
    if sources or weights is None:
        raise fail("--architecture takes --weights W.safetensors, and no other file", 2)
    return {"safetensors": weights}


def _lines(path: Path) -> list[str]:
    """Class names, one a line, the last with or without its line end."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"--labels: {path} can't be read: {error}", 2) from None


def read_processing(file: str) -> Processing:
    """The declaration that a file holds; ends the program with the field that is wrong in it."""
    try:
        return read(read_document(file, "declaration of processing"))
    except ProcessingError as error:
        raise fail(f"--processing: {error.detail}", 2) from None


def source_files(
    sources: list[str],
    weights: Path | None,
    data: Path | None,
    folder: Path,
    *,
    tflite: bool = True,
    processing: Processing | None = None,
) -> dict[str, Path]:
    """The files to upload, by format: those that were named, or exports of the net that was, in TFLite if wanted."""
    if not sources:
        raise fail("name the model: .onnx, .tflite, or net.py:function (or --architecture with --weights)", 2)
    if len(sources) == 1 and ".py:" in sources[0]:
        return _export(sources[0], weights, data, folder, tflite=tflite, processing=processing)
    found = {}
    for source in sources:
        path = Path(source)
        if path.suffix in UNSAFE:
            raise fail(
                f"{source}: such files can run code when loaded; push net.py:function --weights w.safetensors", 2
            )
        if path.suffix not in FORMATS:
            raise fail(f"{source}: give .onnx, .tflite, or net.py:function", 2)
        if not path.is_file():
            raise fail(f"{source}: there is no such file", 2)
        found[FORMATS[path.suffix]] = path
    return found


def _export(
    spec: str,
    weights: Path | None,
    data: Path | None,
    folder: Path,
    *,
    tflite: bool,
    processing: Processing | None,
) -> dict[str, Path]:
    from converters.dataset import example_rows
    from converters.errors import ConversionError
    from converters.steps import export

    if data is None:
        raise fail("a torch net needs example rows: give --evaluation or --calibration", 2)
    try:
        examples = example_rows(data, str(data), processing)
        net = export.load_net(spec, weights)
        errors.print("exporting the net …")
        forms = export.export_forms(net, examples, folder, "model", tflite=tflite)
    except (ConversionError, ValueError, OSError) as error:
        raise fail(str(error)) from None
    if tflite and not export.can_export_tflite():
        errors.print("litert-torch is not installed here: no TFLite form (pip install 'shoal[convert-tflite]')")
    return {form.value: path for form, path in forms.items()}


def upload_file(api: Client, path: Path) -> str:
    """Upload a file with a bar of its progress; the digest of its bytes."""
    if not path.is_file():
        raise fail(f"{path}: there is no such file", 2)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(f"uploading {path.name}", total=path.stat().st_size)
        return api.upload(path, lambda size: progress.advance(task, size))


@model.command("architectures")
def list_architectures(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List the nets registered on the server, for `push --architecture`."""
    with client(context) as api:
        show_rows(
            api.items("/architectures"),
            output,
            [("architecture", lambda row: row["name"])],
            empty="the server has none: install a package with an entry point in the group shoal.architectures",
        )


@model.command("processing-schema")
def processing_schema(context: typer.Context) -> None:
    """Print the JSON Schema of a file for `push --processing`."""
    with client(context) as api:
        print_json(api.get("/schemas/processing"))


@model.command("list")
def list_models(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List models."""
    with client(context) as api:
        columns = [("model", lambda row: row["name"]), ("latest version", lambda row: row["latest_version"])]
        show_rows(
            api.items("/models"), output, columns, empty="there is no model yet; push one with `shoal model push`"
        )


@model.command("show")
def show_model(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL[@VERSION]", help="A model, or one version of it.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a model's versions, or one version."""
    name, _, version = reference.partition("@")
    with client(context) as api:
        if version:
            show_object(api.get(f"/models/{segment(name)}/versions/{segment(version)}"), output)
            return
        columns = [
            ("version", lambda row: row["reference"]),
            ("forms", lambda row: ", ".join(form["format"] for form in row["sources"])),
            ("created", lambda row: row["created_at"][:19]),
        ]
        show_rows(api.items(f"/models/{segment(name)}/versions"), output, columns, empty="it has no version")


@model.command("delete")
def delete_version(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version to delete.")],
    yes: YesOption = False,  # noqa: FBT002
) -> None:
    """Delete a version that was never rolled out, with its variants and files."""
    name, _, version = reference.partition("@")
    if not name or not version:
        raise fail(f"{reference!r} is not MODEL@VERSION", 2)
    confirm(f"delete {reference}, its variants and its files?", yes=yes)
    with client(context) as api:
        api.delete(f"/models/{segment(name)}/versions/{segment(version)}")


@variant.command("build")
def build(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version to convert.")],
    profiles: Annotated[list[str], typer.Option("--profile", help="A profile to build for; repeat.")],
    rebuild: Annotated[bool, typer.Option(help="Also build again what is ready.")] = False,  # noqa: FBT002
    prune: Annotated[
        str | None,
        typer.Option(help="Train: remove channels, `adaptive` or the share of the work to be left."),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Train: also a net with this share of zeros.")] = None,
    distill: Annotated[
        str | None, typer.Option(metavar="ARCHITECTURE", help="Train: also a smaller registered net.")
    ] = None,
    quantize_aware: Annotated[bool, typer.Option(help="Train: also fine-tune for integers.")] = False,  # noqa: FBT002
    epochs: Annotated[float, typer.Option(help="Of each fine-tuning.", min=0.01)] = 5.0,
    learning_rate: Annotated[float, typer.Option(help="The highest of each fine-tuning.", min=1e-7)] = 1e-3,
    budget_points: Annotated[float, typer.Option(help="Points that adaptive pruning may cost.", min=0.0)] = 0.5,
    wait: Annotated[bool, typer.Option(help="Wait until they are built.")] = True,  # noqa: FBT002
    output: OutputOption = Output.TABLE,
) -> None:
    """Build a version's variants, and wait until each is judged by the gate.

    With --prune and the like the server trains first: for weights of a registered architecture that were pushed with
    rows to train on. Exit code 1 when the gate refuses one, or one can't be built.

    Example: shoal variant build mnist@2 --profile rpi5-litert --profile gateway
    """
    plan: Json | None = None
    if prune or sparsity is not None or distill or quantize_aware:
        plan = {
            "prune": pruned_share(prune),
            "sparsity": sparsity,
            "student": distill,
            "quantize_aware": quantize_aware,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "budget_points": budget_points,
        }
    with client(context) as api:
        body = {"version": reference, "profiles": profiles, "rebuild": rebuild, "training": plan}
        asked = api.post("/variants", body)
        variants = _await(api, [one["id"] for one in asked]) if wait else asked
        _show_variants(variants, output)
        bad = [one for one in variants if one["state"] in {"refused", "failed", "cancelled"}]
        for one in bad if output is Output.TABLE else []:
            errors.print(f"[red]{one['state']}[/] {one['profile']}: {_reason(one)}")
        if bad:
            raise typer.Exit(1)


def _await(api: Client, ids: list[str]) -> list[Json]:
    variants: list[Json] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        tasks = [progress.add_task("", total=1.0, step="") for _ in ids]
        for variants in api.wait_for_variants(ids):
            for task, one in zip(tasks, variants, strict=True):
                job = one["job"] or {"progress": 0, "step": ""}
                progress.update(task, description=one["profile"], completed=job["progress"], step=job["step"])
    return variants


@variant.command("list")
def list_variants(
    context: typer.Context,
    version: Annotated[str | None, typer.Option(metavar="MODEL@VERSION", help="Only of this version.")] = None,
    profile_name: Annotated[str | None, typer.Option("--profile", help="Only for this profile.")] = None,
    state: Annotated[str | None, typer.Option(help="queued, building, ready, refused, failed or cancelled.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List variants with what was measured."""
    with client(context) as api:
        _show_variants(list(api.items("/variants", version=version, profile=profile_name, state=state)), output)


@variant.command("show")
def show_variant(
    context: typer.Context,
    variant_id: Annotated[str, typer.Argument(help="Its id.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show one variant: candidates, measurements, lineage and the gate's checks."""
    with client(context) as api:
        show_object(api.get(f"/variants/{segment(variant_id)}"), output)


@variant.command("cancel")
def cancel(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version.")],
    profile_name: Annotated[str, typer.Option("--profile", help="The profile it is being built for.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Cancel the building of a variant, whether it waits or runs."""
    with client(context) as api:
        found = _variant_of(api, reference, profile_name)
        _show_variants([api.post(f"/variants/{segment(found['id'])}/cancel")], output)


@variant.command("explain")
def explain(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The version.")],
    profile_name: Annotated[str, typer.Option("--profile", help="The profile it was built for.")],
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Also draw accuracy against latency here (.svg, .png).")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Explain a variant: every candidate that was tried, and its fate.

    A star marks the Pareto front: no other candidate within budgets is as good in accuracy, latency and size.
    """
    with client(context) as api:
        found = _variant_of(api, reference, profile_name)
        candidates = found["candidates"]
        if picture is not None:
            plot(candidates, picture, title=f"{reference} for {profile_name}")
        if output is Output.TABLE and found["failure"] and not candidates:
            raise fail(found["failure"]["detail"])
        if output is Output.TABLE and candidates:
            show_fitting(lambda width: table(candidates, width))
        else:
            show_rows(candidates, output, [], empty="nothing was tried yet: it is still being built")
        if output is Output.TABLE and found["gate"]:
            errors.print(f"measured on {found['gate']['measured_on']}")


def _variant_of(api: Client, reference: str, profile_name: str) -> Json:
    found = next(api.items("/variants", version=reference, profile=profile_name), None)
    if found is None:
        remedy = f"build it with `shoal variant build {reference} --profile {profile_name}`"
        raise fail(f"{reference} has no variant for {profile_name!r}: {remedy}", 4)
    return found


def _show_variants(variants: list[Json], output: Output) -> None:
    def measured(name: str, row: Json) -> object:
        return (row["measurements"] or {}).get(name)

    show_rows(
        variants,
        output,
        [
            ("version", lambda row: f"{row['model']}@{row['version']}"),
            ("profile", lambda row: row["profile"]),
            ("state", lambda row: row["state"]),
            ("proven", lambda row: row["proven"]),
            ("precision", lambda row: row["precision"]),
            ("MB", lambda row: row["size"] / 1e6 if row["size"] else None),
            ("accuracy", lambda row: measured("accuracy", row)),
            ("p95 ms", lambda row: measured("latency_p95_ms", row)),
        ],
        empty="there is no such variant; build one with `shoal variant build`",
    )


def _reason(one: Json) -> str:
    if one["failure"]:
        return str(one["failure"]["detail"])
    return "; ".join(check["detail"] for check in (one["gate"] or {"checks": []})["checks"] if not check["holds"])
