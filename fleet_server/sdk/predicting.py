"""`predict`: rows in pieces to the fleet, two at once, and answers together again in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fleet_server.sdk.errors import NetError, ShoalError

PIECE_BYTES = 16 << 20
IN_FLIGHT = 2
Json = dict[str, Any]
Send = Callable[[bytes, int], tuple[bytes, str]]


def predict(given: Any, inputs: Sequence[Json], send: Send, *, piece_bytes: int = PIECE_BYTES) -> Any:
    """Answers to rows, of the kind that the rows are: tensors to tensors, arrays to arrays.

    Args:
        given: rows of the only input, or rows by the name of the input.
        inputs: of the version, as the API shows them: `name`, `dtype`, `shape`.
        send: posts a request and gives the answer.
        piece_bytes: of a request at most; a row is never divided.

    Returns:
        The output, or outputs by name where there are several.

    Raises:
        NetError: when the rows do not fit the model.
        ShoalError: when an answer makes no sense.
    """
    import numpy as np

    arrays, as_tensors = fitting(given, inputs)
    rows = len(next(iter(arrays.values())))
    pieces = list(_answers(arrays, rows, send, piece_bytes))
    found = {name: np.concatenate([part[name] for part in pieces]) for name in pieces[0]}
    if as_tensors:
        import torch

        found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def _answers(arrays: Mapping[str, Any], rows: int, send: Send, piece_bytes: int) -> Iterator[dict[str, Any]]:
    """Answers to pieces in their order; no more than two are on their way, or wait, at once."""
    a_row = max(1, sum(array.nbytes for array in arrays.values()) // rows)
    step = max(1, piece_bytes // a_row)
    waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="shoal-predict") as pool:
        try:
            for start in range(0, rows, step):
                if len(waiting) == IN_FLIGHT:
                    yield _whole(*waiting.popleft())
                piece = {name: array[start : start + step] for name, array in arrays.items()}
                waiting.append((min(step, rows - start), pool.submit(_ask, piece, send)))
            while waiting:
                yield _whole(*waiting.popleft())
        finally:
            for _, one in waiting:
                one.cancel()


def _ask(piece: Mapping[str, Any], send: Send) -> dict[str, Any]:
    from agent.client.encoding import Wish, answer_of, header, parts_of
    from agent.client.errors import ModelFailedError

    parts = parts_of(piece)
    head = header(parts, Wish())
    body, length = send(b"".join([head, *(part.content for part in parts)]), len(head))
    try:
        return dict(answer_of(body, length))
    except ModelFailedError as error:
        raise ShoalError(f"the server's answer can't be read: {error}") from None


def _whole(rows: int, answer: Future[dict[str, Any]]) -> dict[str, Any]:
    found = answer.result()
    for name, value in found.items():
        if value.ndim == 0 or len(value) != rows:
            raise ShoalError(
                f"output {name!r} has shape {list(value.shape)} for {rows} rows: one answer a row is meant"
            )
    if not found:
        raise ShoalError("the answer has no output")
    return found


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
