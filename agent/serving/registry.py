"""Which artifacts the worker has loaded, and what each is there for. It knows no HTTP."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from agent.protocol.messages import Exposure, ModelWindow
from agent.protocol.samples import Sampling
from agent.samples.offering import Sampler
from agent.samples.sample import Sample
from agent.serving.company import Company
from agent.serving.exposure import Beside
from agent.serving.models import LoadedModel


class Registry:
    """Which artifacts are loaded, which of them answers each model's requests, and which runs beside it."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], LoadedModel] = {}
        self._serving: dict[str, LoadedModel] = {}
        self._company = Company()
        self._beside: dict[str, Beside] = {}
        self._sampling: dict[str, Sampling] = {}
        self._swaps: Counter[str] = Counter()
        self._leaving: list[LoadedModel] = []  # taken out, with counts that nobody has collected

    def add(self, model: LoadedModel) -> None:
        """Keep a loaded artifact beside what serves; one that is there already is closed and replaced."""
        key = (model.manifest.model, model.manifest.digest)
        old = self._loaded.get(key)
        self._loaded[key] = model
        model.company = self._company
        self._choose_of(model)
        if old is not None:
            if self._serving.get(key[0]) is old:
                self._serving[key[0]] = model
            self._end_beside(old)
            self._leaving.append(old)
            threading.Thread(target=old.close, daemon=True).start()

    def activate(self, model: str, digest: str) -> bool:
        """Let a loaded artifact answer from now on; false when it is not loaded."""
        loaded = self._loaded.get((model, digest))
        if loaded is None:
            return False
        self._end_beside(loaded)
        self._swaps[model] += self._serving.get(model) is not loaded
        self._serving[model] = loaded
        return True

    def swaps(self) -> dict[str, int]:
        """By model, how often another artifact began to answer."""
        return dict(self._swaps)

    def expose(self, model: str, digest: str, exposure: Exposure) -> bool:
        """Let a loaded artifact run beside what serves; false when it is not loaded, or nothing else serves."""
        loaded, serving = self._loaded.get((model, digest)), self._serving.get(model)
        if loaded is None or serving is None or loaded is serving:
            return False
        before = self._beside.pop(model, None)
        if before is not None:
            before.end()
        self._beside[model] = Beside(loaded, exposure)
        return True

    def beside(self, model: str) -> Beside | None:
        """What runs beside the artifact that answers a model's requests."""
        return self._beside.get(model)

    def remove(self, model: str, digest: str) -> LoadedModel | None:
        """Take an artifact out; its caller closes it."""
        loaded = self._loaded.pop((model, digest), None)
        if loaded is not None:
            self._leaving.append(loaded)
            self._end_beside(loaded)
        if loaded is not None and self._serving.get(model) is loaded:
            del self._serving[model]
        return loaded

    def _end_beside(self, loaded: LoadedModel) -> None:
        beside = self._beside.get(loaded.manifest.model)
        if beside is not None and beside.model is loaded:
            beside.end()
            del self._beside[loaded.manifest.model]

    def serving(self, model: str) -> LoadedModel | None:
        """What answers a model's requests."""
        return self._serving.get(model)

    def names(self) -> list[str]:
        """Models that have something serving."""
        return sorted(self._serving)

    def all(self) -> list[LoadedModel]:
        """Everything that is loaded."""
        return list(self._loaded.values())

    def collect(self) -> list[ModelWindow]:
        """What every artifact did since the last time, those that were taken out meanwhile too."""
        closed = [loaded for loaded in self._leaving if loaded.closed]
        windows = [loaded.recorder.collect() for loaded in (*self._loaded.values(), *self._leaving)]
        self._leaving = [loaded for loaded in self._leaving if loaded not in closed]
        return windows

    def choose_samples(self, wanted: Iterable[Sampling]) -> None:
        """Which rows may be kept from now on; what was chosen before and not taken is forgotten."""
        self._sampling = {one.model: one for one in wanted}
        for loaded in self._loaded.values():
            self._choose_of(loaded)

    def _choose_of(self, loaded: LoadedModel) -> None:
        sampling = self._sampling.get(loaded.manifest.model)
        loaded.sampler = None if sampling is None else Sampler(loaded.manifest, sampling)

    def take_samples(self) -> list[tuple[Sample, ...]]:
        """What was chosen since the last time, an artifact at a time."""
        samplers = [one.sampler for one in (*self._loaded.values(), *self._leaving) if one.sampler is not None]
        return [taken for sampler in samplers if (taken := sampler.take())]

    def versions_of(self, model: str) -> list[LoadedModel]:
        """Everything loaded of a model, what serves first: feedback may name a request the old one answered."""
        mine = [loaded for (name, _), loaded in self._loaded.items() if name == model]
        return sorted(mine, key=lambda loaded: loaded is not self._serving.get(model))
