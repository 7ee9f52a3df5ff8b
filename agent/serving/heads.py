"""JSON parts of requests that were read before: a program that asks again and again sends the same bytes each time.

Only what is wholly said by those bytes is remembered: binary tensors of numbers, and where they lie in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import STRING
from agent.serving.bad_request import BadRequestError
from agent.serving.descriptions import Described
from agent.serving.oip import InferRequest, Memory, Span, check_span, decode_request, read_span
from agent.serving.tensors import Bytes, from_binary

LONGEST = 1024  # bytes of a part that is remembered
MOST = 128  # that are remembered


@dataclass(frozen=True)
class _Known:
    """What a part says.

    Attributes:
        described: what read it; another may understand something else by it.
        tensors: what it says of each, how many bytes each has, in the order of the body, or where else it lies.
        rooms: of shared memory, for outputs.
        request: with all else.
        size: bytes of the whole body.
    """

    described: Described
    tensors: tuple[tuple[TensorSpec, int, list[int], Span | None], ...]
    rooms: tuple[tuple[str, Span], ...]
    request: InferRequest
    size: int


class Heads:
    """Reads requests. Used by one event loop alone."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def read(self, body: Bytes, header_length: int | None, described: Described, memory: Memory | None) -> InferRequest:
        """As `decode_request`, with less to do for a part that is known.

        Raises:
            BadRequestError: saying what does not fit.
        """
        if header_length is None or not 0 < header_length <= LONGEST:
            return decode_request(body, header_length, described, memory)
        view = memoryview(body)
        head = bytes(view[:header_length])
        known = self._known.get(head)
        if known is None or known.described is not described or known.size != len(body):
            request = decode_request(body, header_length, described, memory)
            self._remember(head, len(body), described, request)
            return request
        inputs, position = {}, header_length
        for spec, size, shape, span in known.tensors:
            try:
                raw = view[position : position + size] if span is None else read_span(memory, span)
                inputs[spec.name] = from_binary(spec, raw, shape)
            except BadRequestError as error:
                raise error.within("inputs", spec.name) from None
            position += size if span is None else 0
        for name, room in known.rooms:
            try:
                check_span(memory, room)
            except BadRequestError as error:
                raise error.within("outputs", name) from None
        said = known.request
        return InferRequest(said.request_id, inputs, said.outputs, said.spans, said.priority, said.timeout_s)

    def _remember(self, head: bytes, size: int, described: Described, request: InferRequest) -> None:
        specs = {spec.name: spec for spec in described.inputs}
        spans = request.spans
        tensors = tuple(
            (specs[name], array.nbytes, list(array.shape), spans.get(name)) for name, array in request.inputs.items()
        )
        inside = len(head) + sum(length for _, length, _, span in tensors if span is None)
        # Nothing is in the JSON then.
        if inside != size or request.request_id or any(spec.dtype == STRING for spec, _, _, _ in tensors):
            return
        rooms = tuple((one.name, one.span) for one in request.outputs if one.span is not None)
        if len(self._known) >= MOST:
            self._known.clear()
        without = InferRequest("", {}, request.outputs, spans, request.priority, request.timeout_s)
        self._known[head] = _Known(described, tensors, rooms, without, size)
