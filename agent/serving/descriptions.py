"""How models describe themselves to clients: metadata of the Open Inference Protocol, and Triton's configuration."""

from __future__ import annotations

from typing import Any, Protocol

from agent.protocol.manifest import TensorSpec
from agent.serving.tensors import datatype


class Described(Protocol):
    """What requests are read and answers written by: a `Manifest`, or an ensemble that fits together."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def version(self) -> str:
        """Its version."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the order it takes them."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the order it gives them."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index."""
        ...

    @property
    def max_batch(self) -> int:
        """The largest batch that is made of waiting requests."""
        ...

    @property
    def row_by_row(self) -> bool:
        """Whether its first dimensions of 1 take any number of rows."""
        ...

    @property
    def platform(self) -> str:
        """What runs it."""
        ...

    @property
    def runtime(self) -> str:
        """That loads it."""
        ...


def shape_of(spec: TensorSpec, *, any_rows: bool) -> list[int]:
    """A tensor's shape as clients see it."""
    return [-1, *spec.shape[1:]] if any_rows else list(spec.shape)


def metadata(manifest: Described) -> dict[str, Any]:
    """A model's description."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {
            "name": spec.name,
            "datatype": datatype(spec.dtype),
            "shape": shape_of(spec, any_rows=manifest.row_by_row),
        }

    return {
        "name": manifest.model,
        "versions": [manifest.version],
        "platform": manifest.platform,
        "inputs": [tensor(spec) for spec in manifest.inputs],
        "outputs": [tensor(spec) for spec in manifest.outputs],
    }


def configuration(manifest: Described) -> dict[str, Any]:
    """A model's configuration as Triton's clients read it: its dims have no batch axis where there are batches."""
    batched = manifest.max_batch > 1

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        name, shape = datatype(spec.dtype), shape_of(spec, any_rows=manifest.row_by_row)
        kind = "STRING" if name == "BYTES" else name
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": shape[1:] if batched else shape}

    return {
        "name": manifest.model,
        "platform": manifest.platform,
        "backend": manifest.runtime,
        "max_batch_size": manifest.max_batch if batched else 0,
        "input": [tensor(spec) for spec in manifest.inputs],
        "output": [tensor(spec) for spec in manifest.outputs],
    }
