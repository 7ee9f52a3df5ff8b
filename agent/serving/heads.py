"""JSON parts of requests that were read before: a program that asks again and again sends the same bytes each time.

Only what is wholly said by those bytes is remembered: binary tensors of numbers, and no part of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import STRING
from agent.serving.bad_request import BadRequestError
from agent.serving.descriptions import Described
from agent.serving.oip import InferRequest, Memory, decode_request
from agent.serving.tensors import Bytes, from_binary

LONGEST = 1024  # bytes of a part that is remembered
MOST = 128  # that are remembered


@dataclass(frozen=True)
class _Known:
    """What a part says.

    Attributes:
        described: what read it; another may understand something else by it.
        tensors: what it says of each, and how many bytes each has, in the order of the body.
        request: with all else.
        size: bytes of the whole body.
    """

    described: Described
    tensors: tuple[tuple[TensorSpec, int, list[int]], ...]
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
        for spec, size, shape in known.tensors:
            try:
                inputs[spec.name] = from_binary(spec, view[position : position + size], shape)
            except BadRequestError as error:
                raise error.within("inputs", spec.name) from None
            position += size
        said = known.request
        return InferRequest(said.request_id, inputs, said.outputs, said.priority, said.timeout_s)

    def _remember(self, head: bytes, size: int, described: Described, request: InferRequest) -> None:
        specs = {spec.name: spec for spec in described.inputs}
        tensors = tuple((specs[name], array.nbytes, list(array.shape)) for name, array in request.inputs.items())
        inside = len(head) + sum(one[1] for one in tensors) == size  # nothing is in the JSON, or in shared memory
        if (
            not inside
            or request.request_id
            or any(spec.dtype == STRING for spec, _, _ in tensors)
            or any(wanted.span is not None for wanted in request.outputs)
        ):
            return
        if len(self._known) >= MOST:
            self._known.clear()
        without = InferRequest(request.request_id, {}, request.outputs, request.priority, request.timeout_s)
        self._known[head] = _Known(described, tensors, without, size)
