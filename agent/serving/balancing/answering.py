"""What peers may ask of this device: to infer with one artifact, while it has room for its own. It forwards nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from urllib.parse import unquote

from agent.serving.balancing import headers
from agent.serving.balancing.book import Load
from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.exchange import Answer, Request, again_answer, error_answer
from agent.serving.inferring import Inferring
from agent.serving.models import LoadedModel, RetiredError
from agent.serving.registry import Registry

SHARE = 2  # peers' requests may wait while less than one part in so many of the queue is taken


class PeerApi:
    """The routes for peers, as `agent.serving.connection` asks for them.

    Args:
        registry: what is loaded.
        inferring: answers.
        buffers: that bodies arrive in.
        clients: the peers that are connected.

    Attributes:
        answered: by an artifact's digest, how many requests of peers were answered.
        refused: likewise, how many were not.
    """

    def __init__(self, registry: Registry, inferring: Inferring, buffers: Buffers, clients: Clients) -> None:
        self._registry = registry
        self._inferring = inferring
        self.buffers = buffers
        self.clients = clients
        self.draining = False
        self.answered: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:  # noqa: ARG002
        """Nothing is: a peer waits for its network in any case."""
        return False

    async def answer(self, request: Request) -> Answer:
        """One request's answer."""
        match [request.method, *map(unquote, request.path.partition("?")[0].split("/"))]:
            case ["POST", "", "v2", "models", name, "versions", version, "infer"]:
                pass
            case _:
                return error_answer(404, "peers may ask to infer with a version of a model, and nothing else")
        try:
            digest, timeout_s = headers.artifact_of(request.headers), headers.timeout_s_of(request.headers)
        except ValueError as error:
            return error_answer(400, str(error))
        model = self._registry.serving(name)
        if model is None or model.manifest.version != version or digest not in {None, model.manifest.digest}:
            return error_answer(404, f"this device does not serve that artifact of {name[:200]!r}")
        answer = await self._answered(request, model, timeout_s)
        counter = self.answered if answer.status == 200 else self.refused
        counter[model.manifest.digest] += 1
        answer.headers = {**answer.headers, **headers.load_headers(Load(*model.load()))}
        return answer

    async def _answered(self, request: Request, model: LoadedModel, timeout_s: float) -> Answer:
        if model.waiting * SHARE >= model.manifest.scheduling.queue_limit:
            return again_answer(429, "this device has enough to do with requests of its own")
        try:
            return await self._inferring.answer_peer(request, model, timeout_s)
        except RetiredError:
            return error_answer(404, "this device serves another version now")
