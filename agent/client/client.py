"""The client: one call, one answer, whatever happens to the worker meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from agent.client.aio import Asyncio
from agent.client.blocking import Blocking
from agent.client.core import Core, FeedbackResult, Settings
from agent.client.encoding import Answer, Wish
from agent.client.waiting import now

CONNECTIONS = 8
TIMEOUT_S = 30.0


class Client:
    """Asks the models that this device serves. May be used by several threads, and as a context.

    What passes by itself is waited for within the time that a call has: a model that is being loaded, a worker that
    starts again, a full queue. An inference has no effect, so it is asked again where its answer was lost.

    Large inputs go by shared memory, and large outputs come by it, where the agent's user may open it. Which outputs
    are large is known by the answers before to inputs of the same shapes.

    Args:
        address: `unix:/path` or `host:port`; by default SHOAL_AGENT_UNIX_SOCKET, the installed agent's socket
            (/run/shoal/api.sock) where there is one, SHOAL_AGENT_LISTEN, or 127.0.0.1:8470.
        connections: at most, and so requests at once; others wait.
        timeout_s: of a call that names no other.
        shared_memory: whether large tensors may go by shared memory.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connections: int = CONNECTIONS,
        timeout_s: float = TIMEOUT_S,
        shared_memory: bool = True,
    ) -> None:
        self._core = Core(Settings(address, connections, timeout_s, shared_memory), Blocking())

    def __enter__(self) -> Self:
        """The client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End its connections, and remove its shared memory; of calls under way, when they end."""
        now(self._core.close())

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """What a model answers.

        Args:
            model: its name; or an ensemble's.
            inputs: arrays by input, or what numpy makes arrays of; strings as arrays of `str`.
            version: only if it is this one that serves.
            outputs: that are wanted; all of them by default.
            priority: 1 for the most urgent to 100; 50 by default.
            timeout_s: seconds until the answer is given up.
            request_id: names it for `feedback`, in at most 256 characters; none by default, and then the device
                remembers nothing of it.

        Returns:
            The outputs by name. The arrays are the caller's own, to keep and to write: what came by shared memory was
            copied out of it before this returns, for the next request uses it again. `version` and `request_id` say
            which version answered what.

        Raises:
            BadRequestError: when inputs do not fit the model; its `field` says which.
            UnknownModelError: when the device serves no such model.
            NotReadyError: when it is not loaded, or the agent not there, all the time.
            BusyError: when too many requests wait, all the time.
            TimedOutError: when there is no answer in time.
            ModelFailedError: when the model fails on these inputs.
        """
        wish = Wish(outputs, priority, None, request_id)
        return now(self._core.infer(model, version, inputs, wish, timeout_s))

    def infer_image(
        self,
        model: str,
        image: bytes,
        *,
        version: str | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """What a model says of an image, where its version declares how images become inputs.

        Args:
            model: its name.
            image: a JPEG, PNG, WebP or BMP file.
            version: only if it is this one that serves.
            timeout_s: seconds until the answer is given up.
            request_id: names it for `feedback`.

        Returns:
            `scores`, `classes`, and where there are any `labels` and `boxes`.

        Raises:
            InferenceError: as `infer` does.
        """
        return now(self._core.infer_image(model, version, image, request_id, timeout_s))

    def feedback(
        self, model: str, labels: Mapping[str, int | Sequence[int]], *, timeout_s: float | None = None
    ) -> FeedbackResult:
        """Tell what the truth was of requests that were answered: the fleet server sees how right each version is.

        It is sent again where its answer was lost; what was counted then is not counted twice, but among the unknown.

        Args:
            model: its name; of an ensemble, that of a model that classifies in one of its steps.
            labels: by the id of the request, the index of the true class; one a row where it had several.
            timeout_s: seconds until it is given up.

        Returns:
            How many rows were matched. A worker remembers the last 65,536 rows of a version until then.

        Raises:
            BadRequestError: when a label is no index.
            InferenceError: as `infer` does.
        """
        return now(self._core.feedback(model, labels, timeout_s))

    def metadata(self, model: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """A model's `name`, `versions`, `platform`, `inputs` and `outputs`, as the protocol has them.

        Raises:
            InferenceError: as `infer` does.
        """
        return now(self._core.metadata(model, timeout_s))

    def ready(self, model: str, *, timeout_s: float = 1.0) -> bool:
        """Whether a model would answer now."""
        return now(self._core.ready(model, timeout_s))

    def wait_until_ready(self, model: str, timeout_s: float = 60.0) -> None:
        """Wait until a model answers: also for one that the fleet server has yet to send.

        Raises:
            NotReadyError: when it did not in that time.
        """
        now(self._core.wait_until_ready(model, timeout_s))


class AsyncClient:
    """The same for asyncio, without threads; it belongs to the event loop that uses it first.

    A call that is cancelled is over: its connection ends, and its shared memory is not used again. What the device has
    begun of it, it ends, and nobody gets the answer.

    Args:
        address: as `Client` takes it.
        connections: at most, and so requests at once.
        timeout_s: of a call that names no other.
        shared_memory: whether large tensors may go by shared memory; they are copied on the loop.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connections: int = CONNECTIONS,
        timeout_s: float = TIMEOUT_S,
        shared_memory: bool = True,
    ) -> None:
        self._core = Core(Settings(address, connections, timeout_s, shared_memory), Asyncio())

    async def __aenter__(self) -> Self:
        """The client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> None:
        """As `Client.close`."""
        await self._core.close()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """As `Client.infer`."""
        wish = Wish(outputs, priority, None, request_id)
        return await self._core.infer(model, version, inputs, wish, timeout_s)

    async def infer_image(
        self,
        model: str,
        image: bytes,
        *,
        version: str | None = None,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """As `Client.infer_image`."""
        return await self._core.infer_image(model, version, image, request_id, timeout_s)

    async def feedback(
        self, model: str, labels: Mapping[str, int | Sequence[int]], *, timeout_s: float | None = None
    ) -> FeedbackResult:
        """As `Client.feedback`."""
        return await self._core.feedback(model, labels, timeout_s)

    async def metadata(self, model: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._core.metadata(model, timeout_s)

    async def ready(self, model: str, *, timeout_s: float = 1.0) -> bool:
        """As `Client.ready`."""
        return await self._core.ready(model, timeout_s)

    async def wait_until_ready(self, model: str, timeout_s: float = 60.0) -> None:
        """As `Client.wait_until_ready`."""
        await self._core.wait_until_ready(model, timeout_s)
