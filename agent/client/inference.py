"""One inference: its inputs on their way by a lane, its outputs back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import msgspec

from agent.client.again import Again
from agent.client.encoding import Answer, Part, Placed, Wish, answer_of, header
from agent.client.http1 import Ask, Reply
from agent.client.lane import Lane, RefusedError
from agent.client.sizes import SHARED_FROM, Sizes
from agent.protocol.datatypes import HEADER_LENGTH, HEADER_LENGTH_READ
from agent.runtimes.base import Array

FORGOTTEN_MOST = 2  # times that the API does not know a region that it was told of, until the body has it all
BINARY = "application/octet-stream"


class Inference(msgspec.Struct, frozen=True):
    """What is asked.

    Attributes:
        path: of the API.
        parts: the inputs.
        wish: how it is to be answered.
        kind: it and those like it, whose outputs have the same sizes as a rule.
    """

    path: str
    parts: Sequence[Part]
    wish: Wish
    kind: Hashable

    async def by(self, lane: Lane, sizes: Sizes, again: Again) -> Answer:
        """Its answer.

        Outputs are asked for in shared memory where answers to its kind had large ones. Where that turns out to be
        wrong, as of another version that has more outputs, or larger ones, it is asked again without.

        Raises:
            RefusedError: when the API does not answer it.
            OSError: when nobody does; see `Link.ask`.
            TimedOutError: when there is no time left.
            ModelFailedError: when the answer can't be read.
        """
        large = sum(part.content.nbytes for part in self.parts) >= SHARED_FROM
        room, forgotten = sizes.large(self.kind), 0
        while True:
            again.left_s()
            placed = None
            if (large or room) and forgotten < FORGOTTEN_MOST:
                placed = await lane.place(self.parts if large else (), room, again.until)
            rooms = {} if placed is None else placed.outputs
            try:
                reply = await lane.ask(self._ask(placed, sizes, again), again.until)
            except RefusedError as refused:
                if placed is not None and lane.memory is not None and _forgot(refused.reply):
                    lane.memory.forgotten()  # the worker started again
                    forgotten += 1
                elif rooms and _is_about_outputs(refused.reply):
                    sizes.misfit(self.kind)
                    room = {}
                else:
                    raise
                continue
            answer = answer_of(reply.body, _header_length(reply), placed, lane.memory.read if lane.memory else None)
            if rooms and self.wish.outputs is None and not sizes.knows(self.kind, answer.version):
                room = {}
                continue
            sizes.learn(self.kind, answer.version, {name: _size(array) for name, array in answer.items()})
            return answer

    def _ask(self, placed: Placed | None, sizes: Sizes, again: Again) -> Ask:
        wish = self.wish
        said = Wish(wish.outputs, wish.priority, again.left_s(), wish.request_id)
        head = header(self.parts, said, placed, sizes.outputs(self.kind))
        inputs = () if placed is not None and placed.inputs else tuple(part.content for part in self.parts)
        return Ask("POST", self.path, [head, *inputs], {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))})


def _size(array: Array) -> int:
    return 0 if array.dtype.kind == "O" else array.nbytes


def _header_length(reply: Reply) -> str:
    return reply.headers.get(HEADER_LENGTH_READ, "")


def _forgot(reply: Reply) -> bool:
    """Whether it says that a region is not registered."""
    return reply.status == 400 and "is not registered" in reply.said


def _is_about_outputs(reply: Reply) -> bool:
    """Whether outputs are what is wrong; an agent that names no field may mean them."""
    return reply.status == 400 and reply.field[:1] in {(), ("outputs",)}
