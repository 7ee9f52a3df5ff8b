"""Has a model that nothing serves served by what served it before, until what ought to serve can."""

from __future__ import annotations

from collections.abc import Callable, Collection

from agent.update.lastgood import Good, LastGood
from agent.update.store import ArtifactStore
from agent.update.updater import Updater


class StandIns:
    """Called by the supervisor's main loop only.

    Args:
        good: what served well.
        store: where its bytes are, if they are still.
        updater: what ought to serve.
        load: lets the worker load a version; returns the request's number.
        unload: lets the worker forget one: model and digest.
    """

    def __init__(
        self,
        good: LastGood,
        store: ArtifactStore,
        updater: Updater,
        load: Callable[[Good], int],
        unload: Callable[[str, str], object],
    ) -> None:
        self._good = good
        self._store = store
        self._updater = updater
        self._load = load
        self._unload = unload
        self._useless: set[tuple[str, str]] = set()
        self._loading: dict[int, Good] = {}
        self._loaded: dict[str, Good] = {}

    def tick(self, serving: dict[str, str], loading: Collection[str]) -> None:
        """Load what must stand in, and let go what need not any more.

        Args:
            serving: digests of what serves, by model.
            loading: models for which something is being loaded.
        """
        busy = {*serving, *loading, *(good.manifest.model for good in self._loading.values())}
        for model in self._good.models:
            if model not in busy and (good := self._choose(model)) is not None:
                self._loading[self._load(good)] = good
        for model, good in list(self._loaded.items()):
            active, digest = self._updater.active(model), good.manifest.digest
            proved = active is not None and serving.get(model) == active.manifest.digest
            unwanted = model not in self._good.models
            if (proved or unwanted) and not self._updater.uses(model, digest):
                del self._loaded[model]
                self._unload(model, digest)

    def answered(self, request_id: int, *, ok: bool) -> Good | None:
        """The worker answered a load; what was loaded, if it stands in and was."""
        good = self._loading.pop(request_id)
        if not ok:
            self._useless.add((good.manifest.model, good.manifest.digest))
            return None
        self._loaded[good.manifest.model] = good
        return good

    @property
    def loading(self) -> tuple[Good, ...]:
        """What is being loaded."""
        return tuple(self._loading.values())

    def asked(self, request_id: int) -> bool:
        """Whether a request to load is one of these."""
        return request_id in self._loading

    def unloaded(self, model: str, digest: str) -> None:
        """The worker was told to forget an artifact."""
        if model in self._loaded and self._loaded[model].manifest.digest == digest:
            del self._loaded[model]

    def worker_ended(self) -> None:
        """A fresh worker has nothing loaded, and may load what the last one could not."""
        self._loaded.clear()
        self._loading.clear()
        self._useless.clear()

    def _choose(self, model: str) -> Good | None:
        """The newest version that served well, and whose bytes are right."""
        for good in self._good.of(model):
            key = (model, good.manifest.digest)
            if key not in self._useless:
                if self._store.verify(good.manifest.digest):
                    return good
                self._useless.add(key)
        return None
