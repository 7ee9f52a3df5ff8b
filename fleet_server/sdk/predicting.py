"""`predict`: rows of a notebook to the fleet and its answers back, as tensors where they were tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fleet_server.sdk.errors import NetError, ShoalError

if TYPE_CHECKING:
    from fleet_server.sdk.tensors import Ask, Gathered

Json = dict[str, Any]


def predict(given: Any, inputs: Sequence[Json], ask: Ask) -> tuple[Any, list[Json]]:
    """Answers to rows, of the kind that the rows are: tensors to tensors, arrays to arrays.

    Args:
        given: rows of the only input, or rows by the name of the input.
        inputs: of the version, as the API shows them: `name`, `dtype`, `shape`.
        ask: posts a request and gives the answer.

    Returns:
        The output, or outputs by name where there are several; and of each device its id as `device`, and the `rows`
        that it answered.

    Raises:
        NetError: when the rows do not fit the model.
        ShoalError: when an answer makes no sense.
    """
    import numpy as np

    from fleet_server.sdk.tensors import in_pieces

    arrays, as_tensors = fitting(given, inputs)
    try:
        pieces = list(in_pieces(ask, arrays))
        found: Json = {name: np.concatenate([one.outputs[name] for one in pieces]) for name in pieces[0].outputs}
    except (ValueError, KeyError) as error:
        raise ShoalError(f"the server's answer can't be read: {error}") from None
    if as_tensors:
        import torch

        found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}
    return next(iter(found.values())) if len(found) == 1 else found, _answered(pieces)


def _answered(pieces: Sequence[Gathered]) -> list[Json]:
    """Rows by device, over all requests."""
    rows: dict[str, int] = {}
    for one in pieces:
        for device in one.devices:
            rows[device["device"]] = rows.get(device["device"], 0) + device["rows"]
    return [{"device": device, "rows": count} for device, count in rows.items()]


def fitting(given: Any, inputs: Sequence[Json]) -> tuple[dict[str, Any], bool]:
    """Rows as arrays that the model takes, and whether they were tensors.

    Raises:
        NetError: naming the input that does not fit, and what the model takes.
    """
    import numpy as np

    named = given if isinstance(given, Mapping) else None
    if named is None:
        if len(inputs) != 1:
            names = [one["name"] for one in inputs]
            raise NetError(f"the model takes {len(inputs)} inputs: give a dict of rows by name: {names}")
        named = {inputs[0]["name"]: given}
    wanted = {one["name"]: one for one in inputs}
    if set(named) != set(wanted):
        raise NetError(f"the model takes the inputs {sorted(wanted)}, not {sorted(map(str, named))}")
    found, as_tensors = {}, False
    for name, value in named.items():
        tensor = hasattr(value, "detach")
        as_tensors = as_tensors or tensor
        array = np.asarray(value.detach().cpu().numpy() if tensor else value)
        found[name] = _typed(name, array, wanted[name])
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) != 1:
        raise NetError(f"every input needs the same number of rows, not {lengths}")
    if not next(iter(lengths.values())):
        raise NetError("there are no rows: give one at least")
    return found, as_tensors


def _typed(name: str, array: Any, spec: Json) -> Any:
    import numpy as np

    sizes: list[int] = spec["shape"][1:]
    agree = array.ndim == len(sizes) + 1 and all(
        size in {-1, got} for size, got in zip(sizes, array.shape[1:], strict=True)
    )
    if not agree:
        takes = ", ".join(["rows", *("any" if size < 0 else str(size) for size in sizes)])
        hint = ""
        if array.ndim == len(sizes) and array.ndim:
            hint = ": give one row as x[None]"
        raise NetError(f"input {name!r} has shape {list(array.shape)}, but the model takes [{takes}]{hint}")
    if spec["dtype"] == "string":
        return array
    dtype = np.dtype(spec["dtype"])
    if array.dtype != dtype and not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise NetError(f"input {name!r} holds {array.dtype}, but the model takes {dtype}: convert it first")
    return array.astype(dtype, copy=False)
