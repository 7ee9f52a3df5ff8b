"""What served well, by model, in a small file of its own: it says what to serve when the journal can't.

It is written when a version has proved itself, and when a model is taken off the device. A journal that was lost or
damaged then costs nothing but the deployments' histories. It knows nothing of the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from agent.files import set_aside, write_durably
from agent.protocol.lifecycle import Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.update.updater import Record

log = logging.getLogger("agent")
KEPT = 4
NEEDED = 2  # what serves, and what it can go back to


class Good(msgspec.Struct, frozen=True):
    """A version that served for good."""

    deployment_id: str
    manifest: Manifest


class LastGood:
    """The file; used by the supervisor's main thread only.

    Attributes:
        lost: why nothing is there of what was there before; empty when all is well.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lost = ""
        self._models: dict[str, list[Good]] = {}
        self._written = msgspec.json.encode(self._models)
        try:
            self._written = path.read_bytes()
            self._models = msgspec.json.decode(self._written, type=dict[str, list[Good]])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.lost = f"{path} can't be read: {error}"
            log.error(self.lost)  # noqa: TRY400
            try:
                set_aside(path)
            except OSError:
                log.warning("%s can't be set aside", path)

    @property
    def models(self) -> list[str]:
        """Those of which something is known."""
        return list(self._models)

    def of(self, model: str) -> list[Good]:
        """What served a model, the newest first."""
        return self._models.get(model, [])

    def needed(self) -> set[str]:
        """Digests of what serves each model, and of what it can go back to."""
        return {good.manifest.digest for goods in self._models.values() for good in goods[:NEEDED]}

    def useful(self) -> list[str]:
        """Digests of what served earlier, of all models, the newest first."""
        ranked = [(rank, good) for goods in self._models.values() for rank, good in enumerate(goods[NEEDED:])]
        return [good.manifest.digest for _, good in sorted(ranked, key=lambda pair: pair[0])]

    def update(self, records: Iterable[Record]) -> None:
        """Take in which versions have proved themselves, and which did badly since.

        Raises:
            OSError: when the file can't be written; it is tried again with the next change.
        """
        models = dict(self._models)
        for record in records:
            model = record.manifest.model
            goods = models.get(model, [])
            if record.phase is Phase.ACTIVE and (not goods or goods[0].deployment_id != record.deployment_id):
                fresh = Good(record.deployment_id, record.manifest)
                others = [good for good in goods if good.manifest.digest != record.manifest.digest]
                models[model] = [fresh, *others][:KEPT]
            elif record.phase in {Phase.ROLLED_BACK, Phase.FAILED}:
                models[model] = [good for good in goods if good.deployment_id != record.deployment_id]
        self._keep({model: goods for model, goods in models.items() if goods})

    def retain(self, models: Collection[str]) -> None:
        """Forget every other model: it was taken off the device.

        Raises:
            OSError: when the file can't be written.
        """
        self._keep({model: goods for model, goods in self._models.items() if model in models})

    def _keep(self, models: dict[str, list[Good]]) -> None:
        self._models = dict(list(models.items())[-LIMITS.deployments :])
        content = msgspec.json.encode(self._models)
        if content != self._written:
            write_durably(self._path, content)
            self._written = content
