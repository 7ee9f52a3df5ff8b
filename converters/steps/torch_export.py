"""From a torch net to a program of `torch.export`, a `.pt2` file. This runs the net's code: see `export`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_ROWS = 4096  # of a batch
NO_WEIGHTS = (
    "programs of torch are made of weights alone: push the version as safetensors of a registered architecture "
    "(`shoal model push --architecture NAME --weights W.safetensors`)"
)


def export_program(net: Any, examples: list[npt.NDArray[Any]], path: Path) -> None:
    """Write the net as a program with a free batch dimension. The same net gives the same bytes.

    Args:
        net: in evaluation mode.
        examples: one array an input, in the order of the net's parameters; the first axis counts rows, and a scalar
            has none. They are not in the file.
        path: where to.

    Raises:
        Exception: whatever torch raises of a net that it can't follow.
    """
    import torch

    tensors = tuple(torch.from_numpy(_two_rows(array)) for array in examples)
    batch = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        free = tuple({0: batch} if tensor.ndim else None for tensor in tensors)
        program = torch.export.export(net, tensors, dynamic_shapes=free)
        program.example_inputs = None  # rows of somebody's data set
        torch.export.save(program, file)
    path.write_bytes(file.getvalue())


def _two_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The first two rows: with one alone, torch takes the batch for fixed. A scalar stays as it is."""
    if not array.ndim:
        return array
    return np.ascontiguousarray(np.concatenate([array[:2], array[:1]])[:2])
