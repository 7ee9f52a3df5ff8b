"""Carries out a device's trials: fetches their files, measures candidates in processes, writes down what came of it.

It has no thread: the supervisor calls `tick`. Everything is in the journal before it is done.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.protocol.delivery import Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.messages import Failure, Trial, TrialReport, TrialResult
from agent.trial.book import CheckTrust, Fetch, Measure, TrialBook, TrialRecord
from agent.trial.job import JOB_FILE, RESULT_FILE, MeasureJob
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.store import ArtifactStore

log = logging.getLogger("agent.trial")
DEADLINE_S = 3600.0
DETAIL_BYTES = 500


class Trials:
    """The trials of this device.

    Args:
        folder: for what measuring processes read and write.
        store: where files of trials lie.
        journal: where trials are kept.
        fetcher: fetches files of trials.
        environment: of measuring processes.
        changed: something is to be reported; files that nothing needs may go.
        check_trust: has a trial's candidates judged, which `trust_answered` is told; asked again and again until then.
    """

    def __init__(
        self,
        folder: Path,
        store: ArtifactStore,
        journal: Journal,
        fetcher: Fetcher,
        environment: dict[str, str],
        *,
        changed: Callable[[], None],
        check_trust: Callable[[Trial], None],
    ) -> None:
        self._folder = folder
        self._store = store
        self._journal = journal
        self._fetcher = fetcher
        self._environment = environment
        self._changed = changed
        self._check_trust = check_trust
        self._book = TrialBook(_read(journal.trials()))
        self._fetching: str | None = None  # the trial whose file is being fetched
        self._process: subprocess.Popen[bytes] | None = None
        self._measuring: Measure | None = None
        self._until = 0.0
        for left in folder.iterdir() if folder.exists() else ():
            if left.name not in self._book.records:
                shutil.rmtree(left, ignore_errors=True)

    def desired(self, trials: tuple[Trial, ...]) -> None:
        """Take in what is wanted; what no longer is ends at once."""
        gone = self._book.desired(trials)
        if self._measuring is not None and self._measuring.trial_id in gone:
            self._end_process()
        if self._fetching in gone:
            self._end_fetch()
        for key in gone:
            shutil.rmtree(self._folder / key, ignore_errors=True)
        self._journal.forget_trials(gone)
        self._keep()
        if gone:
            self._changed()

    def trust_answered(self, trial_id: str, code: WireErrorCode | None, detail: str) -> None:
        """Take the verdict on a trial's candidates."""
        if code is None:
            self._book.trusted(trial_id)
        elif trial_id in self._book.records:
            self._book.failed(trial_id, code, detail)
        self._keep()

    def reports(self) -> tuple[TrialReport, ...]:
        """Every trial, as the server is told."""
        return self._book.reports()

    def kept_digests(self) -> set[str]:
        """Files that must stay."""
        return self._book.kept_digests()

    @property
    def busy(self) -> bool:
        """Whether something is fetched or measured."""
        return self._process is not None or self._fetching is not None

    def tick(self, now: float) -> None:
        """Do what is next."""
        if self._process is not None:
            self._watch(now)
        elif self._fetching is None:
            here = {digest for digest in self._book.kept_digests() if self._store.has(digest)}
            match self._book.next(here):
                case CheckTrust(trial=trial):
                    self._check_trust(trial)
                case Fetch() as fetch:
                    self._fetch(fetch, now)
                case Measure() as measure:
                    self._measure(measure, now)
                case None:
                    pass
        self._keep()

    def keep_all(self) -> None:
        """Write every trial down again: the journal was lost."""
        self._book.changed.update(self._book.records)

    def stop(self) -> None:
        """End what is running; it is taken up again at the next start."""
        self._end_process()
        self._end_fetch()

    def _keep(self) -> None:
        if self._book.changed:
            records = {key: msgspec.json.encode(self._book.records[key]) for key in self._book.changed}
            self._journal.save_trials(records)
            self._book.changed.clear()
            self._changed()

    # -- fetching

    def _fetch(self, fetch: Fetch, now: float) -> None:
        self._fetching = fetch.trial_id
        delivery = self._book.records[fetch.trial_id].trial.delivery
        self._fetcher.begin(fetch.trial_id, fetch.content, self, deadline_s=DEADLINE_S, now=now, delivery=delivery)

    def received(self, key: str, count: int, source: str) -> None:
        """Bytes came; what a trial cost is not counted."""

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """The run's deadline ends a trial that waits for too long."""

    def fetched(self, key: str) -> None:
        """A file came; one that came damaged is not in the store, and is fetched again."""
        if key == self._fetching:
            self._fetching = None

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """A file will not come: the trial is over."""
        self._fetching = None
        self._book.failed(key, code, detail)

    def _end_fetch(self) -> None:
        if self._fetching is not None:
            self._fetcher.cancel(self._fetching)
            self._fetching = None

    def _storage_failed(self, trial_id: str, error: OSError) -> None:
        self._book.failed(trial_id, *self._fetcher.told(error))
        self._end_fetch()

    # -- measuring

    def _measure(self, measure: Measure, now: float) -> None:
        record = self._book.records[measure.trial_id]
        digest = measure.manifest.digest
        if not all(self._store.verify(one) for one in (digest, record.trial.data.digest)):
            return  # the damaged one is gone, and is fetched again
        if not self._book.begin(measure.trial_id, digest):
            return
        self._keep()
        folder = self._folder / measure.trial_id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULT_FILE).unlink(missing_ok=True)
            paths = str(self._store.path(digest)), str(self._store.path(record.trial.data.digest))
            reference = measure.reference
            job = MeasureJob(
                measure.manifest,
                *paths,
                is_reference=measure.is_reference,
                reference=reference,
                reference_path=str(self._store.path(reference.digest)) if reference else "",
            )
            (folder / JOB_FILE).write_bytes(msgspec.json.encode(job))
            with (folder / "stderr").open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "agent.trial.measure", str(folder), "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**self._environment, **os.environ},
                )
        except OSError as error:
            self._storage_failed(measure.trial_id, error)
            return
        log.info("trial %s measures %s", measure.trial_id, digest[:12])
        self._measuring, self._until = measure, now + record.trial.timeout_s

    def _watch(self, now: float) -> None:
        """A result, an early death, or one that takes too long."""
        assert self._process is not None
        assert self._measuring is not None
        measuring, status = self._measuring, self._process.poll()
        if status is None and now < self._until:
            return
        self._end_process()
        folder = self._folder / measuring.trial_id
        if status is None:
            timeout_s = self._book.records[measuring.trial_id].trial.timeout_s
            self._record(measuring, f"measuring it took longer than {timeout_s:g} s")
            return
        try:
            result = msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=TrialResult)
        except (OSError, msgspec.MsgspecError):
            tail = _tail(folder / "stderr")
            self._record(measuring, f"the process that measured it ended with {status}: {tail or 'it said nothing'}")
            return
        self._book.measured(measuring.trial_id, result)

    def _record(self, measuring: Measure, detail: str) -> None:
        digest = measuring.manifest.digest
        failed = TrialResult(digest, failure=Failure(WireErrorCode.MEASURING_FAILED, detail))
        self._book.measured(measuring.trial_id, failed)

    def _end_process(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        self._process, self._measuring = None, None


def _read(rows: dict[str, bytes]) -> dict[str, TrialRecord]:
    """Trials as they were saved; those that make no sense are left out: the server says again what it wants."""
    records = {}
    for key, row in rows.items():
        try:
            records[key] = msgspec.json.decode(row, type=TrialRecord)
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError) as error:
            log.warning("trial %s in the journal can't be read: %s", key, error)
    return records


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-DETAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""
