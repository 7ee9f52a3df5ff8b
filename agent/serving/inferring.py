"""One request to infer: what its body asks, which version answers it, and what versions beside that one get of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from agent.protocol.datatypes import HEADER_LENGTH, HEADER_LENGTH_READ
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.descriptions import Described
from agent.serving.exchange import Answer, Request, again_answer, error_answer
from agent.serving.exposure import Beside
from agent.serving.heads import Heads
from agent.serving.images import ImageRequest, Images, is_image
from agent.serving.models import LoadedModel, RetiredError, rows_of
from agent.serving.oip import InferRequest, encode_response
from agent.serving.registry import Registry
from agent.serving.shared_memory import Regions
from agent.serving.waiting import DeadlineError, QueueFullError

log = logging.getLogger(__name__)
DIGITS = 18  # of a length that makes sense
# A peer's answer, of the request, the manifest of what has no room for it, how long it may wait and how long it has.
Elsewhere = Callable[[Request, Manifest, float, float], Awaitable[Answer | None]]


class Inferring:
    """Answers requests to infer.

    Args:
        registry: what is loaded.
        regions: of shared memory, which requests may name.

    Attributes:
        elsewhere: who is asked where a model has as many requests as may wait; None for nobody.
    """

    def __init__(self, registry: Registry, regions: Regions) -> None:
        self._registry = registry
        self._regions = regions
        self._heads = Heads()
        self._images = Images()
        self._tasks: set[asyncio.Task[None]] = set()
        self.elsewhere: Elsewhere | None = None

    async def answer(self, request: Request, model: LoadedModel, *, split: bool) -> Answer:
        """The answer to one.

        Args:
            request: as it came.
            model: that serves.
            split: whether a version that is tried may answer in its place.

        Raises:
            RetiredError: when the version was taken out meanwhile: another serves.
        """
        try:
            wanted = await self._read(request, model.manifest)
        except BadRequestError as error:
            return _refused(model, error)
        except QueueFullError:
            answer = await self._elsewhere(request, model, 0.0, 0.0)
            if answer is None:
                model.recorder.rejected()
                answer = again_answer(429, "too many images wait to be decoded: send fewer, or later")
            return answer
        beside = self._registry.beside(model.manifest.model)
        if beside is not None and split and beside.answers(wanted.request_id):
            answer = await self._answered_by(beside.model, request, wanted, model.manifest)
            if answer is not None:
                return answer
        try:
            outputs = await _ask(model, wanted)
            answer = await self._encode(wanted, outputs, model.manifest)
        except RetiredError:
            raise
        except QueueFullError as error:
            return await self._full(request, model, wanted, error)
        except Exception as error:  # noqa: BLE001 (whatever the model's runtime raises, the client is told)
            return failed_answer(error, wanted.timeout_s)
        if beside is not None:  # when it is answered: what a copy does to the process is no matter of this client
            answer.then = partial(self._copy, beside, request, wanted, outputs, model.manifest)
        return answer

    def answer_soon(
        self, request: Request, model: LoadedModel, say: Callable[[Answer | None], None], *, alone: bool
    ) -> bool:
        """The same by the shortest way, without a task that waits.

        Args:
            request: as it came.
            model: that serves.
            say: is given the answer, before this returns or later; None when another version serves now.
            alone: whether no other client asks at present, so that nobody waits meanwhile.

        Returns:
            Whether it will be: not where an image has to be decoded, or versions run side by side.
        """
        if is_image(request.headers.get("content-type", "")) or self._registry.beside(model.manifest.model) is not None:
            return False
        try:
            wanted = read_tensors(request, model.manifest, self._regions, self._heads)
        except BadRequestError as error:
            say(_refused(model, error))
            return True
        heard = partial(self._heard, request, model, wanted, say)
        if not (alone and model.infer_now(wanted.inputs, wanted.request_id, heard)):
            try:
                model.take(
                    wanted.inputs, wanted.request_id, heard, priority=wanted.priority, timeout_s=wanted.timeout_s
                )
            except (QueueFullError, RetiredError) as error:
                heard(error)
        return True

    async def answer_peer(self, request: Request, model: LoadedModel, timeout_s: float) -> Answer:
        """The answer to a request that another device had no room for; what is refused of it counts there.

        Args:
            request: as it came.
            model: that serves, and answers it in any case.
            timeout_s: how long it may wait for its turn here, in seconds; 0 for as long as it takes.

        Raises:
            RetiredError: when the version was taken out meanwhile.
        """
        try:
            wanted = await self._read(request, model.manifest)
            left_s = min((one for one in (wanted.timeout_s, timeout_s) if one > 0), default=0.0)
            outputs = await model.infer(wanted.inputs, wanted.request_id, priority=wanted.priority, timeout_s=left_s)
            answer = await self._encode(wanted, outputs, model.manifest)
        except RetiredError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever the model's runtime raises, the peer is told)
            return failed_answer(error, timeout_s)
        beside = self._registry.beside(model.manifest.model)
        if beside is not None:
            answer.then = partial(self._copy, beside, request, wanted, outputs, model.manifest)
        return answer

    def _heard(
        self,
        request: Request,
        model: LoadedModel,
        wanted: InferRequest,
        say: Callable[[Answer | None], None],
        result: Tensors | Exception,
    ) -> None:
        if isinstance(result, RetiredError):
            say(None)
        elif isinstance(result, QueueFullError):
            if self.elsewhere is None:
                say(_busy(model, result))
            else:
                self._begin(self._say_full(request, model, wanted, say, result))
        elif isinstance(result, Exception):
            say(failed_answer(result, wanted.timeout_s))
        else:
            try:
                answer = tensors_answer(wanted, result, model.manifest, self._regions)
            except Exception as error:  # noqa: BLE001 (an output has no room, or is not what the manifest says)
                answer = failed_answer(error, wanted.timeout_s)
            say(answer)

    async def _say_full(
        self,
        request: Request,
        model: LoadedModel,
        wanted: InferRequest,
        say: Callable[[Answer | None], None],
        error: QueueFullError,
    ) -> None:
        try:
            answer = await self._full(request, model, wanted, error)
        except Exception:
            log.exception("a request could not be forwarded")
            answer = _busy(model, error)
        say(answer)

    async def _full(
        self, request: Request, model: LoadedModel, wanted: InferRequest | ImageRequest, error: QueueFullError
    ) -> Answer:
        """The answer to a request for which there is no room: another device's, or that there is none."""
        answer = None
        if isinstance(wanted, ImageRequest) or not (wanted.spans or any(one.span for one in wanted.outputs)):
            answer = await self._elsewhere(request, model, wanted.timeout_s, error.waited_s)
        return _busy(model, error) if answer is None else answer

    async def _elsewhere(
        self, request: Request, model: LoadedModel, timeout_s: float, waited_s: float
    ) -> Answer | None:
        if self.elsewhere is None or request.was_forwarded:
            return None
        return await self.elsewhere(request, model.manifest, timeout_s, waited_s)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, request: Request, manifest: Manifest) -> InferRequest | ImageRequest:
        """What a request's body asks of a model: tensors, or an image."""
        content_type = request.headers.get("content-type", "")
        if is_image(content_type):
            request_id = request.headers.get("x-request-id", "")
            return await self._images.read(bytes(request.body), content_type, request_id, manifest)
        return read_tensors(request, manifest, self._regions, self._heads)

    async def _encode(self, wanted: InferRequest | ImageRequest, outputs: Tensors, manifest: Manifest) -> Answer:
        if isinstance(wanted, ImageRequest):
            body = await self._images.answer(wanted, outputs, manifest)
            return Answer(200, body, {"Content-Type": "application/json"})
        return tensors_answer(wanted, outputs, manifest, self._regions)

    async def _answered_by(
        self, model: LoadedModel, request: Request, wanted: InferRequest | ImageRequest, served: Manifest
    ) -> Answer | None:
        """An answer of a version that is tried; None when it has none: that counts as its own, and no client's loss.

        Args:
            model: the version.
            request: as it came.
            wanted: what the version that serves understands by it.
            served: manifest of that one.
        """
        mine = model.manifest
        try:
            asked = wanted if _understood_alike(mine, served) else await self._read(request, mine)
            return await self._encode(asked, await _ask(model, asked), mine)
        except (BadRequestError, QueueFullError):
            model.recorder.rejected()
            return None
        except Exception:  # noqa: BLE001 (whatever its runtime raises: the version that serves answers in its place)
            return None

    def _copy(
        self, beside: Beside, request: Request, wanted: InferRequest | ImageRequest, outputs: Tensors, served: Manifest
    ) -> None:
        """Tell a version that runs beside of a request that was answered."""
        if isinstance(wanted, ImageRequest) and beside.model.manifest.processing != served.processing:
            self._begin(self._copy_image(beside, request, outputs))
            return
        beside.served(wanted.inputs, outputs, rows_of(wanted.inputs), wanted.request_id)

    async def _copy_image(self, beside: Beside, request: Request, outputs: Tensors) -> None:
        """The same for an image that a version turns into another tensor than the one that serves."""
        try:
            asked = await self._read(request, beside.model.manifest)
        except BadRequestError:
            beside.model.recorder.rejected()
        except QueueFullError:
            pass  # as a copy for which there is no room
        else:
            beside.served(asked.inputs, outputs, 1, asked.request_id)


async def _ask(model: LoadedModel, wanted: InferRequest | ImageRequest) -> Tensors:
    return await model.infer(wanted.inputs, wanted.request_id, priority=wanted.priority, timeout_s=wanted.timeout_s)


def _busy(model: LoadedModel, error: QueueFullError) -> Answer:
    model.recorder.rejected()
    return failed_answer(error, 0.0)


def _refused(model: LoadedModel, error: BadRequestError) -> Answer:
    model.recorder.rejected()
    return error_answer(error.status, str(error), error.field)


def read_tensors(request: Request, described: Described, regions: Regions, heads: Heads) -> InferRequest:
    """What a request's body asks, in tensors.

    Raises:
        BadRequestError: saying what does not fit.
    """
    length = request.headers.get(HEADER_LENGTH_READ, "")
    if length and not (length.isascii() and length.isdigit()):
        raise BadRequestError(f"{HEADER_LENGTH} is no number of bytes", HEADER_LENGTH)
    header_bytes = int(length[:DIGITS]) if length else None
    return heads.read(request.body, header_bytes, described, regions if request.local else None)


def tensors_answer(wanted: InferRequest, outputs: Tensors, described: Described, regions: Regions) -> Answer:
    """Tensors as they were asked for.

    Raises:
        BadRequestError: when one has no room where it was to go, or no classes.
    """
    body, header_length = encode_response(wanted, outputs, described, regions)
    if header_length is None:
        return Answer(200, body, {"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)}
    return Answer(200, body, headers)


def failed_answer(error: Exception, timeout_s: float, where: str = "") -> Answer:
    """Why a request has no answer.

    Args:
        error: that a model raised, or what was done with its outputs.
        timeout_s: how long the client would wait, in seconds.
        where: which of several models it was, before the reason; empty for the only one.
    """
    place = f"{where}: " if where else ""
    match error:
        case BadRequestError():  # its output has no room where it was to go
            return error_answer(error.status, f"{place}{error}", () if where else error.field)
        case QueueFullError():
            busy = f"{place}too many requests wait for this model: send fewer, or later"
            return again_answer(429, busy, error.retry_after_s)
        case DeadlineError():
            late = f"{place}its turn did not come within the {timeout_s:g} s that it may wait (timeout)"
            return error_answer(504, late)
        case _:
            return error_answer(500, f"{place}the model failed: {str(error)[:500]}")


def _understood_alike(one: Manifest, other: Manifest) -> bool:
    """Whether two versions make the same of a request."""
    return (one.inputs, one.outputs, one.processing) == (other.inputs, other.outputs, other.processing)
