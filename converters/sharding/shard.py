"""The job that cuts a net into stages: read, time, plan, cut, measure, plan again by what was measured, prove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.manifest import ModelFormat
from agent.trial.dataset import Array, Dataset
from converters.dataset import load_dataset
from converters.digest import file_digest
from converters.errors import ConversionError
from converters.job import DataFile, Sharding, ShardJob, StageFile
from converters.package import onnx_specs
from converters.sample import sample_rows
from converters.sharding.cutter import cut, largest_difference, run_stages
from converters.sharding.graph import Graph, open_session, read
from converters.sharding.planner import Chain, NoPlanError, Place, Stage, plan
from converters.sharding.timing import node_seconds, seconds_of
from converters.sources import parse_onnx
from converters.steps.onnx_tidy import tidied

ProgressCall = Callable[[float, str], None]
PROBE_ROWS = 3
PROOF_ROWS = 16
DATA_ROWS = 256
DATA_BYTES = 256 << 20
ROUNDS = 3


@dataclass(frozen=True)
class _Cut:
    """A plan that was carried out: stages as planned, their models, and seconds of one row of each, measured here."""

    planned: tuple[Stage, ...]
    models: list[Any]
    seconds: list[float]
    places: dict[str, Place]

    @property
    def slowest(self) -> float:
        """Seconds of the slowest stage on its device, with its transfers."""
        pairs = zip(self.planned, self.seconds, strict=True)
        return max(seconds / self.places[stage.device].speed + stage.transfer_s for stage, seconds in pairs)


def shard(job: ShardJob, folder: Path, progress: ProgressCall) -> Sharding:
    """Cut a net into stages for devices.

    Raises:
        ConversionError: `not_shardable`, `no_plan`, `stages_differ`, `bad_model` or `bad_data`.
    """
    if job.source.format is not ModelFormat.ONNX:
        raise ConversionError("not_shardable", "sources: only an ONNX form can be cut: push one beside it", "sources")
    if not job.devices:
        raise ConversionError("no_plan", "devices: none were given", "devices")
    progress(0.05, "read")
    path = Path(job.source.path)
    specs = onnx_specs(parse_onnx(path))
    data = {
        field: load_dataset(Path(file.path), specs[0], field, job.processing)
        for field, file in (("evaluation", job.evaluation), ("calibration", job.calibration))
        if file is not None
    }
    sample = sample_rows(data, job.source, specs)
    if sample.whole:
        name = min(sample.whole)
        detail = f"sources: the net can't be cut: its input {name!r} has no axis that counts rows: export it with one"
        raise ConversionError("not_shardable", detail, "sources")
    size = PROBE_ROWS if all(spec.shape[:1] == (-1,) for spec in specs[0]) else 1
    whole = tidied(path, widen=False)
    graph = read(tidied(path, widen=False), _batch(sample, size))
    row = _batch(sample, 1)
    progress(0.2, "time nodes")
    seconds = node_seconds(whole, row)
    best = _planned(graph, seconds, job, row, progress)
    progress(0.7, "compare with the whole")
    exact, difference = _proof(whole, best.models, sample, size)
    progress(0.9, "write")
    files = _written(best, folder, data, sample, size)
    quantized = all(graph.quantized(stage.end) for stage in best.planned[:-1])
    return Sharding(files, seconds_of(whole, row), difference, exact, quantized)


def _batch(data: Dataset, size: int) -> dict[str, Array]:
    return next(data.batches(size))


def _planned(
    graph: Graph, seconds: dict[str, float], job: ShardJob, row: dict[str, Array], progress: ProgressCall
) -> _Cut:
    """The best of a few plans, each made with what was measured of the stages of the one before."""
    places = {one.device: Place(one.device, one.memory, one.speed, one.bytes_per_s) for one in job.devices}
    chain, planned = _first(graph, seconds, list(places.values()), job)
    best: _Cut | None = None
    tried: set[tuple[tuple[int, str], ...]] = set()
    for round_ in range(ROUNDS):
        tried.add(tuple((stage.end, stage.device) for stage in planned))
        progress(0.3 + 0.4 * round_ / ROUNDS, "cut")
        models = cut(graph, [stage.end for stage in planned[:-1]])
        outputs = [row, *run_stages(models, row)[:-1]]
        measured = [seconds_of(model, inputs) for model, inputs in zip(models, outputs, strict=True)]
        made = _Cut(planned, models, measured, places)
        if best is None or made.slowest < best.slowest:
            best = made
        scaled = chain.seconds.copy()
        for stage, took in zip(planned, measured, strict=True):
            estimated = float(scaled[stage.start : stage.end].sum())
            scaled[stage.start : stage.end] *= took / estimated if estimated else 1.0
        chain = replace(chain, seconds=scaled)
        planned = plan(chain, list(places.values()), len(planned), job.rows)
        if tuple((stage.end, stage.device) for stage in planned) in tried:
            break
    assert best is not None
    return best


def _first(
    graph: Graph, seconds: dict[str, float], places: list[Place], job: ShardJob
) -> tuple[Chain, tuple[Stage, ...]]:
    """A plan that cuts at quantized tensors alone, where there is one; else any."""
    for quantized in (True, False):
        chain = graph.chain(seconds, quantized=quantized)
        try:
            return chain, plan(chain, places, job.stages, job.rows)
        except NoPlanError as error:
            said = str(error)
    raise ConversionError("no_plan", said, said.partition(":")[0])


def _proof(whole: Any, stages: Sequence[Any], sample: Dataset, size: int) -> tuple[bool, float]:
    """Whether stages answer as the whole where nothing is optimized, and the largest difference where all is."""
    exact, difference = True, 0.0
    for plain in (True, False):
        session = open_session(whole, plain=plain)
        names = [value.name for value in session.get_outputs()]
        for batch in sample.part(0, PROOF_ROWS).batches(size):
            expected = dict(zip(names, session.run(names, batch), strict=True))
            found = run_stages(stages, batch, plain=plain)[-1]
            if plain:
                largest_difference(found, expected)
                exact &= all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
            else:
                difference = max(difference, largest_difference(found, expected))
    return exact, difference


def _written(made: _Cut, folder: Path, data: dict[str, Dataset], sample: Dataset, size: int) -> tuple[StageFile, ...]:
    evaluation = _activations(made.models, data.get("evaluation", sample), folder, "evaluation", size)
    calibration: Sequence[DataFile | None] = [None] * len(made.models)
    if "calibration" in data:
        calibration = _activations(made.models, data["calibration"], folder, "calibration", size)
    found = []
    for number, (stage, model) in enumerate(zip(made.planned, made.models, strict=True)):
        path = folder / f"stage-{number + 1}.onnx"
        path.write_bytes(model.SerializeToString())
        found.append(
            StageFile(
                path=path.name,
                digest=file_digest(path),
                size=path.stat().st_size,
                evaluation=evaluation[number],
                calibration=calibration[number],
                device=stage.device,
                nodes=stage.end - stage.start,
                compute_s=made.seconds[number] / made.places[stage.device].speed,
                weight_bytes=stage.weight_bytes,
                activation_bytes=stage.activation_bytes,
                bytes_in=stage.bytes_in,
                bytes_out=stage.bytes_out,
                transfer_s=stage.transfer_s,
            )
        )
    return tuple(found)


def _activations(models: Sequence[Any], data: Dataset, folder: Path, field: str, size: int) -> list[DataFile]:
    """What comes to each stage of a data set's first rows, as a data set of its own without labels."""
    sessions = [open_session(model, plain=False) for model in models]
    kept: list[dict[str, list[Array]]] = [{} for _ in models]
    held = 0
    for batch in data.part(0, DATA_ROWS).batches(size):
        arrays = batch
        for number, session in enumerate(sessions):
            for name, array in arrays.items():
                kept[number].setdefault(name, []).append(array)
                held += array.nbytes
            names = [value.name for value in session.get_outputs()]
            arrays = dict(zip(names, session.run(names, arrays), strict=True))
        if held > DATA_BYTES:
            break
    files = []
    for number, rows in enumerate(kept):
        path = folder / f"stage-{number + 1}-{field}.npz"
        arrays = {name: np.concatenate(pieces) for name, pieces in rows.items()}
        texts = {name: array.astype(str) if array.dtype.kind == "O" else array for name, array in arrays.items()}
        np.savez(path, **texts)  # type: ignore[arg-type]
        files.append(DataFile(file_digest(path), path.name))
    return files
