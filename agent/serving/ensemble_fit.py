"""Whether models fit together as an ensemble wants them to, and what it takes and gives then. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.protocol.manifest import Manifest, TensorSpec
from agent.serving.ensemble_config import EnsembleConfig, StepConfig

VERSION = "1"
PLATFORM = "ensemble"


class MisfitError(Exception):
    """Models don't fit together; the message names the field and the remedy."""


@dataclass(frozen=True)
class Fitted:
    """An ensemble as its clients see it: what `agent.serving.oip` needs of a model.

    Attributes:
        model: the ensemble's name.
        version: always the same: the versions of its models are theirs.
        inputs: in the declared order.
        outputs: likewise.
        labels: of the classes, where all outputs come from one model.
        max_batch: the smallest of its models'.
        platform: what it runs on, as the protocol says it.
        runtime: none: its models have theirs.
        row_by_row: never as a whole: a model that takes one row at a time is asked by its step.
    """

    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    max_batch: int
    version: str = VERSION
    platform: str = PLATFORM
    runtime: str = ""
    row_by_row: bool = False


@dataclass(frozen=True)
class _Use:
    """A model's tensor that is one of the ensemble's."""

    place: str
    dtype: str
    shape: tuple[int, ...]


def fit(ensemble: EnsembleConfig, members: Mapping[str, Manifest]) -> Fitted:
    """What an ensemble of these models takes and gives.

    Args:
        ensemble: as declared.
        members: by model, the manifest of what would answer; of every model that it names.

    Raises:
        MisfitError: when a model lacks a tensor that a step names, wants one that the step does not name, or when
            datatypes or shapes of a tensor differ between the models that make and take it.
    """
    uses: dict[str, list[_Use]] = {}
    for step in ensemble.steps:
        member = members[step.model]
        place, version = ensemble.place(step), f"{member.model}@{member.version}"
        for name in _unnamed(step, member):
            raise MisfitError(f"{place}.inputs: {version} wants {name!r}: name the tensor that it is given")
        for key, mapping, specs in (
            ("inputs", step.inputs, member.inputs),
            ("outputs", step.outputs, member.outputs),
        ):
            by_name = {spec.name: spec for spec in specs}
            for name, tensor in mapping.items():
                if name not in by_name:
                    has = ", ".join(by_name)
                    raise MisfitError(f"{place}.{key}.{name}: {version} has none of that name, but {has}")
                spec = by_name[name]
                shape = served_shape(member, spec)
                uses.setdefault(tensor, []).append(_Use(f"{place}.{key}.{name} ({version})", spec.dtype, shape))
    tensors = {tensor: _spec(tensor, found) for tensor, found in uses.items()}
    return Fitted(
        model=ensemble.name,
        inputs=tuple(tensors[name] for name in ensemble.inputs),
        outputs=tuple(tensors[name] for name in ensemble.outputs),
        labels=_labels(ensemble, members),
        max_batch=min(member.max_batch for member in members.values()),
    )


def served_shape(member: Manifest, spec: TensorSpec) -> tuple[int, ...]:
    """The shape that requests may have: of a model that takes one row at a time, any number of them."""
    return (-1, *spec.shape[1:]) if member.row_by_row else spec.shape


def _unnamed(step: StepConfig, member: Manifest) -> list[str]:
    return [spec.name for spec in member.inputs if spec.name not in step.inputs]


def _spec(tensor: str, uses: list[_Use]) -> TensorSpec:
    """A tensor that all its uses agree about: a size that one of them fixes is so for all."""
    first, shape = uses[0], uses[0].shape
    for other in uses[1:]:
        alike = len(shape) == len(other.shape) and all(
            -1 in sizes or sizes[0] == sizes[1] for sizes in zip(shape, other.shape, strict=True)
        )
        if other.dtype != first.dtype or not alike:
            raise MisfitError(
                f"{other.place}: {tensor!r} is {other.dtype} {list(other.shape)} there, and {first.dtype} "
                f"{list(shape)} for {first.place}: name another tensor, or roll out versions that fit together"
            )
        shape = tuple(max(sizes) for sizes in zip(shape, other.shape, strict=True))
    return TensorSpec(tensor, first.dtype, shape)


def _labels(ensemble: EnsembleConfig, members: Mapping[str, Manifest]) -> tuple[str, ...]:
    makers = {step.model for step in ensemble.steps if set(ensemble.outputs) & set(step.outputs.values())}
    return members[makers.pop()].labels if len(makers) == 1 else ()


def problem_of(manifest: Manifest, inputs: Iterable[tuple[TensorSpec, str, tuple[int, ...]]]) -> str | None:
    """What keeps a model from taking some tensors; None when nothing does.

    Args:
        manifest: of the model.
        inputs: of each input its spec, and datatype and shape of what it would be given.
    """
    rows: dict[str, int] = {}
    for spec, dtype, shape in inputs:
        wanted = served_shape(manifest, spec)
        fits = len(shape) == len(wanted) and all(w in {-1, g} for w, g in zip(wanted, shape, strict=True))
        if dtype != spec.dtype or not fits:
            return f"its input {spec.name!r} takes {spec.dtype} {list(wanted)}, and is given {dtype} {list(shape)}"
        if shape:
            rows[spec.name] = shape[0]
    if manifest.row_by_row and len(set(rows.values())) > 1:
        return f"its inputs have different numbers of rows: {rows}"
    return None
