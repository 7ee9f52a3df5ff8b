"""What follows next of a device's trials: pure. One thing at a time: fetch a file, or measure a candidate.

A candidate that ends the agent or the machine must not do so for ever: how often it was begun is written down before it
begins, and after `ATTEMPTS` it counts as failed.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Content, Manifest
from agent.protocol.messages import Failure, Trial, TrialPhase, TrialReport, TrialResult

ATTEMPTS = 3
ENDED = frozenset({TrialPhase.DONE, TrialPhase.FAILED})


class TrialRecord(msgspec.Struct):
    """One trial as the journal holds it.

    Attributes:
        trial: as the server wants it.
        phase: where it is.
        results: what was measured, by digest.
        begun: how often a candidate's measurement was begun, by digest.
        failure: why the trial failed.
        candidates: the trial's manifests.
        trusted: whether TUF metadata vouched for them.
    """

    trial: Trial
    phase: TrialPhase = TrialPhase.PENDING
    results: dict[str, TrialResult] = {}
    begun: dict[str, int] = {}
    failure: Failure | None = None
    candidates: tuple[Manifest, ...] = ()
    trusted: bool = False


@dataclass(frozen=True)
class CheckTrust:
    """A trial whose candidates' manifests must have been signed before anything of it is fetched."""

    trial: Trial


@dataclass(frozen=True)
class Fetch:
    """A file of a trial that is not here."""

    trial_id: str
    content: Content


@dataclass(frozen=True)
class Measure:
    """A candidate whose files are all here."""

    trial_id: str
    manifest: Manifest
    is_reference: bool
    reference: Manifest | None = None  # to be timed in turns with; None where it did not run


class TrialBook:
    """The trials of a device.

    Attributes:
        records: by trial id, in the order they came.
        changed: ids of records that changed since the caller last cleared it.
    """

    def __init__(self, records: dict[str, TrialRecord]) -> None:
        self.records = records
        self.changed: set[str] = set()

    def desired(self, trials: tuple[Trial, ...]) -> list[str]:
        """Take in what is wanted; returns the ids of those that no longer are, which are forgotten."""
        wanted = {trial.trial_id for trial in trials}
        gone = [key for key in self.records if key not in wanted]
        for key in gone:
            del self.records[key]
        self.changed -= set(gone)
        for trial in trials:
            if trial.trial_id not in self.records:
                self.records[trial.trial_id] = TrialRecord(trial, candidates=trial.read_candidates())
                self.changed.add(trial.trial_id)
        return gone

    def next(self, here: set[str]) -> CheckTrust | Fetch | Measure | None:
        """What to do now, given the digests that are here; None when every trial has ended."""
        for record in self.records.values():
            if record.phase not in ENDED:
                return self._next_of(record, here)
        return None

    def trusted(self, trial_id: str) -> None:
        """Every candidate's manifest was signed by whom it must be."""
        if trial_id in self.records:
            self.records[trial_id].trusted = True
            self.changed.add(trial_id)

    def begin(self, trial_id: str, digest: str) -> bool:
        """Note that a candidate is about to be measured; false when it was begun too often, and failed by that."""
        record = self.records[trial_id]
        count = record.begun.get(digest, 0)
        if count >= ATTEMPTS:
            detail = f"measuring it ended the agent or the device {count} times"
            self.measured(trial_id, TrialResult(digest, failure=Failure(WireErrorCode.WORKER_CRASHED, detail)))
            return False
        record.begun = {**record.begun, digest: count + 1}
        self._set(record, TrialPhase.MEASURING)
        return True

    def measured(self, trial_id: str, result: TrialResult) -> None:
        """Take in what was measured of a candidate; the last one ends the trial."""
        record = self.records[trial_id]
        record.results = {**record.results, result.digest: result}
        left = [one for one in record.candidates if one.digest not in record.results]
        self._set(record, record.phase if left else TrialPhase.DONE)

    def failed(self, trial_id: str, code: WireErrorCode, detail: str) -> None:
        """A trial can't go on."""
        record = self.records[trial_id]
        if record.phase not in ENDED:
            record.failure = Failure(code, detail[:2000])
            self._set(record, TrialPhase.FAILED)

    def kept_digests(self) -> set[str]:
        """Files of trials that have not ended."""
        return {
            digest
            for record in self.records.values()
            if record.phase not in ENDED
            for digest in (record.trial.data.digest, *(one.digest for one in record.candidates))
        }

    def reports(self) -> tuple[TrialReport, ...]:
        """Every trial, as the server is told."""
        return tuple(
            TrialReport(
                record.trial.trial_id,
                record.phase,
                tuple(record.results[one.digest] for one in record.candidates if one.digest in record.results),
                record.failure,
            )
            for record in self.records.values()
        )

    def _next_of(self, record: TrialRecord, here: set[str]) -> CheckTrust | Fetch | Measure:
        trial = record.trial
        if not record.trusted:
            return CheckTrust(trial)
        if trial.data.digest not in here:
            return self._fetch(record, trial.data)
        left = [one for one in record.candidates if one.digest not in record.results]
        following = left[0]  # in order: the answers of the others are compared with the reference's
        if following.digest not in here:
            return self._fetch(record, following)
        first = record.candidates[0]
        if following is first:
            return Measure(trial.trial_id, following, is_reference=True)
        ran = first.digest in here and record.results[first.digest].failure is None
        return Measure(trial.trial_id, following, is_reference=False, reference=first if ran else None)

    def _fetch(self, record: TrialRecord, content: Content) -> Fetch:
        if record.phase is TrialPhase.PENDING:
            self._set(record, TrialPhase.DOWNLOADING)
        return Fetch(record.trial.trial_id, content)

    def _set(self, record: TrialRecord, phase: TrialPhase) -> None:
        record.phase = phase
        self.changed.add(record.trial.trial_id)
