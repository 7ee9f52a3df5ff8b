"""A simulated inference worker: what is loaded, what answers, and what it is asked. Pure.

How a version does on this device is decided here: by the device's conduct, and by the effects that a file has for the
version.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

from agent.protocol.manifest import Manifest
from agent.protocol.messages import HostWindow, ModelWindow, ServingReport
from agent.serving.ipc import Peeked
from fleet_server.simulator.behaviours import Effect
from fleet_server.simulator.chances import Purpose, drawn, stream
from fleet_server.simulator.population import Traits, fits
from fleet_server.simulator.traffic import Counted, Load, drifted, sample, swung

EMPTY_MB = 60.0  # of a worker that has nothing loaded
MIB = 2**20
NONE = Effect(version="*@*")


@dataclass(frozen=True)
class Fate:
    """What a version does on this device.

    Attributes:
        effect: what the file says of it.
        fails: it can't be loaded.
        crashes: it ends the worker while it is watched.
    """

    effect: Effect
    fails: bool = False
    crashes: bool = False


class Inference:
    """The worker of one device.

    Args:
        traits: of the device.
        effects: of versions.
        seed: of the fleet.
        now: Unix seconds.
        start: how often the device was started: what is asked of it then is drawn anew.
    """

    def __init__(self, traits: Traits, effects: Sequence[Effect], seed: int, now: float, *, start: int = 1) -> None:
        self._traits = traits
        self._effects = effects
        self._seed = seed
        self._loaded: dict[str, Counted] = {}
        self._serving: dict[str, ServingReport] = {}
        self._fates: dict[tuple[str, str, str], Fate] = {}
        self._start = start
        self._drawn = 0
        self._until = now
        self._phase = float(stream(seed, traits.index, Purpose.TRAFFIC).random())

    @property
    def serving(self) -> tuple[ServingReport, ...]:
        """What answers requests."""
        return tuple(self._serving.values())

    @property
    def memory_mb(self) -> float:
        """Resident memory, in MiB."""
        return EMPTY_MB + sum(one.manifest.size for one in self._loaded.values()) / MIB

    def fate(self, manifest: Manifest) -> Fate:
        """What becomes of a version here; the same whenever it is asked."""
        key = (manifest.model, manifest.version, manifest.profile)
        if key not in self._fates:
            self._fates[key] = self._draw_fate(manifest)
        return self._fates[key]

    def _draw_fate(self, manifest: Manifest) -> Fate:
        index = self._traits.index
        for number, effect in enumerate(self._effects):
            has = stream(self._seed, index, Purpose.EFFECTS, number).random() < effect.share
            if has and fits(effect, manifest, self._traits):
                name = crc32(f"{manifest.model}@{manifest.version}".encode())
                fails, crashes = stream(self._seed, index, Purpose.VERSION, number, name).random(2)
                return Fate(effect, bool(fails < effect.install_fails), bool(crashes < effect.crash))
        return Fate(NONE)

    def load(self, manifest: Manifest, deployment_id: str) -> None:
        """It is loaded, beside what answers."""
        self._loaded[deployment_id] = Counted(manifest, deployment_id, self.provider(manifest))

    def provider(self, manifest: Manifest) -> str:
        """The first execution provider of the manifest that the device has."""
        mine = {provider for runtime in self._traits.facts.runtimes for provider in runtime.providers}
        return next((one for one in manifest.providers if one in mine), "cpu")

    def fell_back(self, manifest: Manifest) -> str:
        """Why none of the providers wanted before that one runs it; empty when the first wanted does."""
        ran = self.provider(manifest)
        before = itertools.takewhile(lambda one: one != ran, manifest.providers)
        return "; ".join(f"{one}: the device does not have it" for one in before)

    def activate(self, deployment_id: str, now: float) -> None:
        """Let it answer from now on, where it is loaded."""
        found = self._loaded.get(deployment_id)
        if found is None:
            return
        self.advance(now)
        manifest = found.manifest
        packages = {one.name: f"{one.package} {one.version}" for one in self._traits.facts.runtimes}
        self._serving[manifest.model] = ServingReport(
            manifest.model,
            manifest.version,
            manifest.digest,
            deployment_id,
            packages.get(manifest.runtime, manifest.runtime),
            found.provider,
            round(drawn(self._traits.conduct.load_s), 3),
            self.fell_back(manifest),
        )

    def unload(self, model: str, digest: str, now: float) -> None:
        """Forget an artifact."""
        self.advance(now)
        for key, one in list(self._loaded.items()):
            if one.manifest.model == model and one.manifest.digest == digest:
                del self._loaded[key]
        if model in self._serving and self._serving[model].digest == digest:
            del self._serving[model]

    def ended(self, now: float) -> None:
        """The process died, and everything with it that was not collected."""
        self._loaded.clear()
        self._serving.clear()
        self._until = now

    def peek(self, now: float) -> Peeked:
        """What it counted since each artifact was loaded."""
        self.advance(now)
        return Peeked(0, tuple(one.totals() for one in self._loaded.values()), self.memory_mb)

    def watched(self, deployment_id: str) -> None:
        """A version is watched no more."""
        if deployment_id in self._loaded:
            self._loaded[deployment_id].watched()

    def collect(self, now: float) -> tuple[ModelWindow, ...]:
        """What artifacts did in the window that ends now."""
        self.advance(now)
        windows = (one.collect() for one in self._loaded.values())
        return tuple(one for one in windows if one is not None)

    def host(self, now: float) -> HostWindow:
        """The device itself: as busy as its requests make it."""
        facts = self._traits.facts
        loads = [self._load(one.manifest, now) for one in self._counted()]
        busy = sum(one.per_s * one.median_s for one in loads) / max(facts.cpu_cores, 1)
        cpu = min(100.0, 3.0 + 100.0 * busy)
        return HostWindow(
            cpu_percent=round(cpu, 1),
            memory_used_mb=round(0.3 * facts.memory_mb + self.memory_mb, 1),
            agent_rss_mb=round(20.0 + self.memory_mb, 1),
            temperature_c=round(40.0 + 0.3 * cpu, 1),
            disk_free_mb=float(facts.disk_free_mb),
        )

    def advance(self, now: float) -> None:
        """Let happen what happens until now."""
        begun, seconds = self._until, now - self._until
        if seconds <= 0:
            return
        self._until = now
        for one in self._counted():
            self._drawn += 1
            chance = stream(self._seed, self._traits.index, Purpose.TRAFFIC, self._start, self._drawn)
            one.add(sample(self._load(one.manifest, begun + seconds / 2), seconds, chance))

    def load_of(self, deployment_id: str, now: float) -> Load | None:
        """How what a deployment brought is asked and answers now; None where it is not loaded."""
        found = self._loaded.get(deployment_id)
        return None if found is None else self._load(found.manifest, now)

    def manifest_of(self, model: str) -> Manifest | None:
        """Of the version of a model that answers; None where none does."""
        serving = self._serving.get(model)
        found = self._loaded.get(serving.deployment_id) if serving else None
        return None if found is None else found.manifest

    def _counted(self) -> Iterable[Counted]:
        keys = [one.deployment_id for one in self._serving.values()]
        return [self._loaded[key] for key in keys if key in self._loaded]

    def _load(self, manifest: Manifest, now: float) -> Load:
        """How a version is asked and answers now."""
        conduct, effect = self._traits.conduct, self.fate(manifest).effect
        requests, latency, labels = conduct.requests, conduct.latency, conduct.labels
        factor = drifted(self._traits.latency_factor, latency.drift, latency.drift_s, self._phase, now)
        return Load(
            per_s=swung(drawn(requests.per_s), requests.swing, requests.peak_h, now),
            median_s=drawn(latency.median_ms) / 1000 * factor * effect.latency_ratio,
            sigma=latency.sigma,
            error_rate=conduct.error_rate if effect.error_rate is None else effect.error_rate,
            label_share=labels.share,
            classes=labels.classes,
            accuracy=labels.accuracy if effect.accuracy is None else effect.accuracy,
            kinds=conduct.answers.classes,
            confidence=conduct.answers.confidence if effect.confidence is None else effect.confidence,
            certainty=conduct.answers.certainty,
        )
