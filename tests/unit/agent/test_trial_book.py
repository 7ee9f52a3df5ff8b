"""What follows next of a device's trials."""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import DataFile, Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import Trial, TrialPhase, TrialResult
from agent.trial.book import ATTEMPTS, CheckTrust, Fetch, Measure, TrialBook

TENSOR = TensorSpec("x", "float32", (-1, 8))
DATA = DataFile("d" * 64, 10, 4)


def manifest(letter: str) -> Manifest:
    return Manifest(
        digest=letter * 64, size=1, chunk_size=1, model="m", version="1", variant_id="v", profile="p",
        format=ModelFormat.ONNX, runtime=RuntimeName.ONNX, precision=Precision.FP32, inputs=(TENSOR,),
        outputs=(TENSOR,),
    )  # fmt: skip


def book(*letters: str, trial_id: str = "t") -> TrialBook:
    found = TrialBook({})
    found.desired((trial(trial_id, *letters),))
    found.trusted(trial_id)
    return found


def trial(trial_id: str, *letters: str) -> Trial:
    return Trial(trial_id, tuple(msgspec.Raw(msgspec.json.encode(manifest(one))) for one in letters), DATA)


def test_nothing_is_fetched_before_the_candidates_are_trusted() -> None:
    one = TrialBook({})
    one.desired((trial("t", "a"),))
    assert one.next(set()) == CheckTrust(trial("t", "a"))
    one.failed("t", WireErrorCode.UNSIGNED, "nobody has signed it")
    assert one.next(set()) is None


def test_data_first_then_candidates_in_order_each_measured_when_it_is_here() -> None:
    one = book("a", "b")
    assert one.next(set()) == Fetch("t", DATA)
    assert one.reports()[0].phase is TrialPhase.DOWNLOADING
    here = {DATA.digest}
    assert one.next(here) == Fetch("t", manifest("a"))
    here.add("b" * 64)
    assert one.next(here) == Fetch("t", manifest("a")), "the reference comes first"
    here.add("a" * 64)
    assert one.next(here) == Measure("t", manifest("a"), is_reference=True)
    assert one.begin("t", "a" * 64)
    one.measured("t", TrialResult("a" * 64))
    assert one.reports()[0].phase is TrialPhase.MEASURING
    assert one.next(here) == Measure("t", manifest("b"), is_reference=False, reference=manifest("a"))
    one.measured("t", TrialResult("b" * 64))
    (report,) = one.reports()
    assert report.phase is TrialPhase.DONE
    assert [result.digest[0] for result in report.results] == ["a", "b"]
    assert one.next(here) is None
    assert one.kept_digests() == set()


def test_a_candidate_that_ends_the_device_again_and_again_counts_as_failed() -> None:
    one = book("a", "b")
    for _ in range(ATTEMPTS):
        assert one.begin("t", "a" * 64)
        one = TrialBook(one.records)  # the agent starts again
    assert not one.begin("t", "a" * 64)
    (report,) = one.reports()
    assert report.results[0].failure is not None
    assert report.results[0].failure.code is WireErrorCode.WORKER_CRASHED
    assert one.next({DATA.digest, "b" * 64}) == Measure("t", manifest("b"), is_reference=False)


def test_what_is_no_longer_wanted_is_forgotten_and_what_is_sent_again_goes_on() -> None:
    one = book("a")
    one.measured("t", TrialResult("a" * 64))
    assert one.desired((trial("t", "a"), trial("u", "b"))) == []
    assert [report.phase for report in one.reports()] == [TrialPhase.DONE, TrialPhase.PENDING]
    assert one.desired(()) == ["t", "u"]
    assert one.reports() == ()
    assert one.changed == set()


def test_a_trial_that_failed_stays_failed_and_keeps_its_first_reason() -> None:
    one = book("a")
    one.failed("t", WireErrorCode.DISK_FULL, "full")
    one.failed("t", WireErrorCode.INTERNAL, "late")
    (report,) = one.reports()
    assert report.phase is TrialPhase.FAILED
    assert report.failure is not None
    assert report.failure.detail == "full"
    assert one.next({DATA.digest, "a" * 64}) is None
