"""The loop of a pipeline: an item, its answer, and what is kept of both."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from agent.database import DatabaseError
from agent.pipelines.client import AwayError, Client, RefusedError
from agent.pipelines.config import PipelineConfig
from agent.pipelines.events import event, is_wanted
from agent.pipelines.health import Health
from agent.pipelines.items import Answer, Item, Progress, Source, SourceError
from agent.pipelines.outbox import Outbox
from agent.problems import PIPELINE_DROPPED, PIPELINE_FAILED, PIPELINE_REFUSED

log = logging.getLogger("agent.pipelines")
WAIT_S = 0.5
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
TRIES = 3  # of one item at which the model fails
EVENT_LIMIT = 4 << 20
FULL = "results were dropped before every sink had them, the oldest first: outbox_mb is full"


class Runner:
    """Runs one pipeline until it is told to stop.

    Args:
        config: of the pipeline.
        device_id: stands in its events.
        source: gives the items.
        client: asks the model.
        outbox: keeps the results.
        health: is told how it goes.
    """

    def __init__(
        self,
        config: PipelineConfig,
        device_id: str,
        source: Source,
        client: Client,
        outbox: Outbox,
        health: Health,
    ) -> None:
        self._config, self._device_id = config, device_id
        self._source, self._client, self._outbox, self._health = source, client, outbox, health
        self._stop = threading.Event()
        self._pause_s = PAUSE_S
        self._not_before = 0.0
        self._why = ""

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()

    def run(self) -> None:
        """Work until told to stop."""
        while not self._stop.is_set():
            self._say_counts()
            pause = self._not_before - time.monotonic()
            if pause > 0:
                self._stop.wait(min(pause, WAIT_S))
                continue
            item = self._attempt("source", lambda: self._source.next(WAIT_S))
            if item is not None:
                self._work(item)

    def _work(self, item: Item) -> None:
        """Ask about an item until it is answered or refused; of a live source, about a newer one where there is one."""
        self._not_before = time.monotonic() + self._config.every_s
        answer: Answer | None = None
        failures, why = 0, item.refusal
        while not why and answer is None:
            try:
                answer = self._client.infer(item)
            except RefusedError as error:
                why = str(error)
            except AwayError as error:
                failures += error.item
                if failures >= TRIES:
                    why = str(error)
                    continue
                self._failed("model", str(error), error.after_s)
                if self._stop.is_set():
                    return
                newer = self._attempt("source", lambda: self._source.next(0)) if self._source.live else None
                if newer is not None:
                    self._settle(item, None, "")
                    item, failures, why = newer, 0, newer.refusal
        if answer is not None:
            self._fine("model")
        self._settle(item, answer, why)

    def _settle(self, item: Item, answer: Answer | None, why: str) -> None:
        """Keep the result with the source's progress; then the source may let go of the item."""
        result = None
        if answer is not None and is_wanted(self._config.only, answer.outputs):
            result = self._event(item, answer)
        elif why:
            self._why = f"{next(iter(item.about.values()), '')}: {why}"[:500]
            self._health.trouble(PIPELINE_REFUSED, "", self._why, ongoing=False)
        progress = item.progress if answer is not None else item.refused_progress or item.progress
        while (result is not None or progress is not None) and not self._keep(result, progress):
            if self._stop.is_set():
                return
            if self._source.live:
                self._health.trouble(PIPELINE_DROPPED, "outbox", "a result could not be kept", ongoing=False)
                break
        self._attempt("source", lambda: self._source.settled(item, answer))

    def _keep(self, result: tuple[str, bytes] | None, progress: Progress | None) -> bool:
        try:
            self._outbox.put(result, progress)
        except DatabaseError as error:
            self._failed("outbox", error.detail)
            return False
        self._fine("outbox")
        return True

    def _event(self, item: Item, answer: Answer) -> tuple[str, bytes] | None:
        carried = set(getattr(self._config.source, "carry", {}).values())
        outputs = [one for one in answer.outputs if one.get("name") not in carried]
        shown = Answer(answer.model, answer.version, outputs)
        identity, body = event(self._device_id, self._config.name, item, shown)
        if len(body) > min(EVENT_LIMIT, int(self._config.outbox_mb * 2**20)):
            detail = f"an answer has {len(body)} bytes, and may have {EVENT_LIMIT} (and no more than outbox_mb)"
            self._health.trouble(PIPELINE_DROPPED, "answer", detail, ongoing=False)
            return None
        return identity, body

    def _attempt(self, part: str, step: Callable[[], Item | None]) -> Item | None:
        try:
            found = step()
        except SourceError as error:
            self._source.close()
            self._failed(part, str(error))
        except AwayError as error:
            self._failed("model", str(error), error.after_s)
        except DatabaseError as error:
            self._failed("outbox", error.detail)
        else:
            self._fine(part)
            return found
        return None

    def _failed(self, part: str, why: str, after_s: float = 0.0) -> None:
        """Say so, and wait a while."""
        self._health.trouble(PIPELINE_FAILED, part, f"{why}; it is tried again")
        self._stop.wait(min(max(self._pause_s, after_s), 3600.0))
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _fine(self, part: str) -> None:
        self._pause_s = PAUSE_S
        self._health.fine(PIPELINE_FAILED, part)

    def _say_counts(self) -> None:
        count = self._outbox.take_dropped()
        if count:
            self._health.trouble(PIPELINE_DROPPED, "outbox", FULL, count=count, ongoing=False)
        self._health.tick(PIPELINE_DROPPED, "outbox", FULL)
        self._health.tick(PIPELINE_REFUSED, "", self._why)
