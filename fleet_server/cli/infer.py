"""`shoal infer`: rows of a file, answered by the devices that serve a model."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fleet_server.cli.output import Json, Output, OutputOption, client, errors, fail, print_json, show_rows

if TYPE_CHECKING:
    from fleet_server.sdk.tensors import Arrays, Gathered

# Names of options, where the output's own is -o.
InputOption = Annotated[
    Path, typer.Option("--input", help="An .npz: an array an input of the model, rows first.", metavar="FILE")
]


def infer(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")],
    source: InputOption,
    results: Annotated[
        Path | None, typer.Option("--results", help="Where the outputs go, as .npz.", metavar="FILE")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Only devices this query (RSQL) holds for. Default: all that serve it.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="Only this version. Default: what most of them serve.")] = None,
    timeout_s: Annotated[float, typer.Option(help="How long a piece of 16 MiB may take, in seconds.")] = 60.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask devices together: they share the rows of a file.

    Rows go in pieces, two of which are under way, and come back in order. What is printed says who answered how many.

    Example: shoal infer mnist --input x.npz --target "site==plant7" --results y.npz
    """
    from fleet_server.sdk.tensors import in_pieces, rows_of

    inputs = _read(source)
    try:
        rows = rows_of(inputs)
    except ValueError as error:
        raise fail(f"--input: {error}", 2) from None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    found: list[Gathered] = []
    with (
        client(context) as api,
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress,
    ):
        task = progress.add_task("rows", total=rows)
        ask = partial(api.infer, model, target=target, version=version, timeout_s=timeout_s)
        try:
            for piece in in_pieces(ask, inputs):
                found.append(piece)
                progress.advance(task, piece.rows)
        except ValueError as error:
            raise fail(f"--input: {error}") from None
    if results is not None:
        _write(results, found)
    _show(found, output)


def _read(path: Path) -> Arrays:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise fail(f"--input: {path} is no .npz that can be read: {error}", 2) from None


def _write(path: Path, found: list[Gathered]) -> None:
    import numpy as np

    outputs = {name: np.concatenate([one.outputs[name] for one in found]) for name in found[0].outputs}
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **outputs)
        unfinished.replace(path)
    except OSError as error:
        raise fail(f"--results: {path} can't be written: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _show(found: list[Gathered], output: Output) -> None:
    rows: Counter[str] = Counter()
    out: dict[str, str] = {}
    for piece in found:
        for one in piece.devices:
            rows[one["device"]] += one["rows"]
            if one["left_out"]:
                out[one["device"]] = one["left_out"]
    devices: list[Json] = [
        {"device": name, "rows": count, "left_out": out.get(name, "")} for name, count in sorted(rows.items())
    ]
    if output is Output.JSON:
        print_json(
            {
                "version": found[0].version,
                "rows": sum(one.rows for one in found),
                "reissued": sum(one.reissued for one in found),
                "devices": devices,
            }
        )
        return
    show_rows(
        devices,
        output,
        [
            ("DEVICE", lambda one: one["device"]),
            ("ROWS", lambda one: one["rows"]),
            ("LEFT OUT", lambda one: one["left_out"]),
        ],
        empty="no device answered",
    )
