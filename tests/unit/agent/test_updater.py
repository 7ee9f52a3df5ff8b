"""The updater: what follows from each event, without any I/O."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import DataFile, Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import DesiredDeployment, DesiredState, ProbationPolicy
from agent.protocol.version import SPOKEN
from agent.update.updater import (
    ATTEMPTS,
    INTERRUPTIONS,
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    Effect,
    LoadArtifact,
    Record,
    StopDownload,
    UnloadArtifact,
    Updater,
    Verify,
)


def manifest(digest: str, model: str = "m", version: str = "1") -> Manifest:
    return Manifest(
        digest * 64, 10, 4, model, version, "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 2)),),
    )  # fmt: skip


def raw(one: Manifest) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(one))


def desired(revision: int, *deployments: tuple[str, str]) -> DesiredState:
    wanted = tuple(DesiredDeployment(key, raw(manifest(digest))) for key, digest in deployments)
    return DesiredState(SPOKEN, "default", revision, wanted)


def phase(updater: Updater, deployment: str) -> Phase:
    return updater.records[deployment].phase


def test_an_active_artifact_that_was_damaged_is_fetched_again_once() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("one", "a")))
    activated(updater, "one")
    assert updater.failed("one", WireErrorCode.DIGEST_MISMATCH, "damaged") == [Download("one")]
    activated(updater, "one")
    assert phase(updater, "one") is Phase.ACTIVE
    updater.failed("one", WireErrorCode.DIGEST_MISMATCH, "damaged again")
    assert phase(updater, "one") is Phase.ROLLED_BACK


def activated(updater: Updater, key: str) -> None:
    if updater.records[key].phase is Phase.PENDING:
        updater.trusted(key)
    updater.downloaded(key)
    updater.verified(key, good=True)
    updater.loaded(key)
    updater.probation_over(key, problem=None)


def test_a_deployment_goes_from_desired_to_active() -> None:
    updater = Updater({}, 0)
    assert updater.desired(desired(1, ("d1", "a"))) == [CheckTrust("d1")]
    assert updater.trusted("d1") == [Download("d1")]
    assert updater.downloaded("d1") == [Verify("d1")]
    assert updater.verified("d1", good=True) == [LoadArtifact("d1")]
    assert updater.loaded("d1") == [ActivateArtifact("d1"), BeginProbation("d1", None)]
    assert updater.probation_over("d1", problem=None) == []
    assert updater.records["d1"].phase is Phase.ACTIVE


def test_an_older_or_repeated_revision_changes_nothing() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(2, ("d1", "a")))
    assert updater.desired(desired(2, ("d9", "b"))) == []
    assert updater.desired(desired(1, ("d9", "b"))) == []
    assert updater.desired(desired(3, ("d1", "a"))) == []
    assert list(updater.records) == ["d1"]


def test_the_old_version_serves_until_the_new_one_has_proved_itself() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(desired(2, ("d2", "b")))
    assert phase(updater, "d1") is Phase.ACTIVE
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    updater.loaded("d2")
    assert updater.probation_over("d2", problem=None) == [UnloadArtifact("m", "a" * 64)]
    assert phase(updater, "d1") is Phase.SUPERSEDED


def test_what_gave_way_is_tried_anew_when_a_later_revision_wants_it_again() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(desired(2, ("d2", "b")))
    activated(updater, "d2")
    assert phase(updater, "d1") is Phase.SUPERSEDED
    assert updater.desired(desired(2, ("d1", "a"))) == []
    updater.desired(desired(9, ("d1", "a")))  # of a server that was restored
    assert (phase(updater, "d1"), phase(updater, "d2")) == (Phase.PENDING, Phase.ACTIVE)
    activated(updater, "d1")
    assert (phase(updater, "d1"), phase(updater, "d2")) == (Phase.ACTIVE, Phase.SUPERSEDED)


def test_what_is_watched_goes_on_serving_when_the_version_before_is_loaded_after_it() -> None:
    """After a restart both are loaded again, in any order."""
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(desired(2, ("d2", "b")))
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    assert ActivateArtifact("d2") in updater.loaded("d2")
    assert updater.loaded("d1") == []
    assert updater.loaded("d2") == [ActivateArtifact("d2")]
    updater.probation_over("d2", problem=None)
    assert updater.uses("m", "b" * 64)
    assert not updater.uses("m", "a" * 64)


def test_what_the_disk_damaged_before_it_was_loaded_is_fetched_again_once() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    for outcome in (Phase.DOWNLOADING, Phase.FAILED):
        if phase(updater, "d1") is Phase.PENDING:
            updater.trusted("d1")
        updater.downloaded("d1")
        updater.verified("d1", good=True)
        updater.failed("d1", WireErrorCode.DIGEST_MISMATCH, "damaged")
        assert phase(updater, "d1") is outcome


def test_a_bad_probation_goes_back_by_itself() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(desired(2, ("d2", "b")))
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    updater.loaded("d2")
    assert updater.probation_over("d2", problem="3 of 5 failed") == [
        ActivateArtifact("d1"),
        UnloadArtifact("m", "b" * 64),
    ]
    assert updater.records["d2"].phase is Phase.ROLLED_BACK
    assert updater.records["d1"].phase is Phase.ACTIVE


def test_wrong_bytes_are_fetched_again_once() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    updater.trusted("d1")
    updater.downloaded("d1")
    assert updater.verified("d1", good=False) == [Download("d1")]
    updater.downloaded("d1")
    assert updater.verified("d1", good=False) == []
    failure = updater.records["d1"].failure
    assert failure is not None
    assert failure.code is WireErrorCode.DIGEST_MISMATCH


def test_a_reboot_loop_ends() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    for _ in range(ATTEMPTS):
        assert updater.recover() == [CheckTrust("d1")], "waiting for metadata is no fault of the deployment's"
    updater.trusted("d1")
    for _ in range(ATTEMPTS - 1):
        assert updater.recover() == [Download("d1")]
    assert updater.recover() == []
    assert updater.records["d1"].phase is Phase.FAILED


def test_a_model_that_is_not_listed_is_taken_off() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    assert updater.desired(desired(2)) == [StopDownload("d1"), UnloadArtifact("m", "a" * 64)]


def test_a_worker_that_dies_while_a_version_is_watched_takes_it_back() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    updater.desired(desired(2, ("d2", "b")))
    updater.trusted("d2")
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    updater.loaded("d2")
    updater.worker_crashed({})
    assert updater.records["d2"].phase is Phase.ROLLED_BACK
    assert updater.worker_ready() == [LoadArtifact("d1")]


def test_what_nobody_signed_never_begins_and_what_serves_goes_on() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    assert updater.desired(desired(2, ("d2", "b"))) == [CheckTrust("d2")]
    assert updater.failed("d2", WireErrorCode.UNSIGNED, "nobody has signed it") == [StopDownload("d2")]
    assert updater.trusted("d2") == []
    assert phase(updater, "d2") is Phase.FAILED
    assert phase(updater, "d1") is Phase.ACTIVE


def tried(updater: Updater, key: str) -> None:
    """Brought to its probation."""
    updater.trusted(key)
    updater.downloaded(key)
    updater.verified(key, good=True)
    updater.loaded(key)


def on_trial(digest: str = "b", **policy: Any) -> Updater:
    """`d1` active and `d2` watched."""
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    activated(updater, "d1")
    state = desired(2, ("d2", digest))
    wanted = msgspec.structs.replace(state.deployments[0], probation=ProbationPolicy(**policy))
    updater.desired(msgspec.structs.replace(state, deployments=(wanted,)))
    tried(updater, "d2")
    assert phase(updater, "d2") is Phase.PROBATION
    return updater


def restarted(updater: Updater) -> Updater:
    """As the journal gives it back."""
    written = {key: msgspec.json.encode(record) for key, record in updater.records.items()}
    return Updater({key: msgspec.json.decode(one, type=Record) for key, one in written.items()}, updater.revision)


def test_after_a_crash_the_old_one_serves_before_the_new_one_is_tried_again() -> None:
    updater = restarted(on_trial())
    assert updater.recover() == [Download("d2")]
    updater.downloaded("d2")
    assert updater.verified("d2", good=True) == [], "the old one does not serve yet"
    assert updater.worker_ready() == [LoadArtifact("d1")]
    assert updater.loaded("d1") == [ActivateArtifact("d1"), LoadArtifact("d2")]
    assert updater.loaded("d2") == [ActivateArtifact("d2"), BeginProbation("d2", "d1")]


def test_where_the_old_one_no_longer_loads_the_new_one_need_not_wait() -> None:
    updater = restarted(on_trial())
    updater.recover()
    updater.downloaded("d2")
    updater.verified("d2", good=True)
    updater.worker_ready()
    assert updater.failed("d1", WireErrorCode.LOAD_FAILED, "gone") == [StopDownload("d1"), LoadArtifact("d2")]


def test_a_version_that_ends_the_agent_again_and_again_is_rolled_back_and_never_tried_again() -> None:
    updater = on_trial()
    for _ in range(INTERRUPTIONS - 1):
        updater = restarted(updater)
        assert updater.recover() == [Download("d2")]
        updater.worker_ready()
        updater.loaded("d1")
        updater.downloaded("d2")
        updater.verified("d2", good=True)
        updater.loaded("d2")
    updater = restarted(updater)
    assert updater.recover() == []
    assert phase(updater, "d2") is Phase.ROLLED_BACK
    assert updater.worker_ready() == [LoadArtifact("d1")]
    assert updater.desired(desired(9, ("d2", "b"))) == []
    assert phase(updater, "d2") is Phase.ROLLED_BACK


def test_what_was_taken_back_stays_known_as_long_as_it_is_wanted() -> None:
    updater = on_trial()
    updater.probation_over("d2", problem="slow")
    for number in range(20):
        updater.desired(desired(10 + number, ("d2", "b"), (f"x{number}", "c")))
        updater.failed(f"x{number}", WireErrorCode.UNSIGNED, "nobody signed it")
        for key in updater.forgettable():
            del updater.records[key]
    assert "d2" in updater.records
    assert len(updater.records) < 12


def test_a_version_that_served_and_then_fails_elsewhere_was_rolled_back() -> None:
    updater = restarted(on_trial())
    updater.recover()
    updater.failed("d2", WireErrorCode.DISK_FULL, "full")
    assert phase(updater, "d2") is Phase.ROLLED_BACK


def test_a_first_version_that_does_badly_is_taken_off_and_nothing_serves() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("d1", "a")))
    tried(updater, "d1")
    assert updater.probation_over("d1", problem="bad") == [UnloadArtifact("m", "a" * 64)]
    assert phase(updater, "d1") is Phase.ROLLED_BACK
    assert updater.worker_ready() == []


def test_going_back_to_the_same_bytes_does_not_take_them_out() -> None:
    updater = on_trial("a")
    assert updater.probation_over("d2", problem="slow") == [LoadArtifact("d1")]
    kept = on_trial("a")
    assert kept.probation_over("d2", problem=None) == []


def test_where_memory_is_short_the_new_one_fails_unless_the_old_one_may_go_first() -> None:
    def short(**policy: Any) -> Updater:
        updater = on_trial(**policy)
        updater = restarted(updater)
        updater.recover()
        updater.worker_ready()
        updater.loaded("d1")
        updater.downloaded("d2")
        updater.verified("d2", good=True)
        return updater

    refused = short()
    assert refused.failed("d2", WireErrorCode.MEMORY_SHORT, "too little") == [StopDownload("d2")]
    assert phase(refused, "d1") is Phase.ACTIVE

    room = [UnloadArtifact("m", "a" * 64), LoadArtifact("d2")]
    replaced = short(replace_when_short=True)
    assert replaced.failed("d2", WireErrorCode.MEMORY_SHORT, "too little") == room
    assert replaced.failed("d2", WireErrorCode.MEMORY_SHORT, "still")[-2:] == [
        UnloadArtifact("m", "b" * 64),
        LoadArtifact("d1"),
    ]
    watched = short(replace_when_short=True)
    watched.failed("d2", WireErrorCode.MEMORY_SHORT, "too little")
    watched.loaded("d2")
    assert watched.probation_over("d2", problem="bad") == [UnloadArtifact("m", "b" * 64), LoadArtifact("d1")]


def test_golden_inputs_are_kept_with_their_artifact() -> None:
    updater = on_trial()
    record = updater.records["d2"]
    record.manifest = msgspec.structs.replace(record.manifest, golden=DataFile("c" * 64, 10, 10))
    assert updater.kept_digests() == {"a" * 64, "b" * 64, "c" * 64}
    updater.probation_over("d2", problem="bad")
    assert updater.kept_digests() == {"a" * 64}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ready", "crash", "restart", "load", "fail", "over", "bad", "short"]), max_size=25))
def test_whatever_happens_a_proven_version_is_served_or_being_loaded(events: list[str]) -> None:
    """A model of the worker beside the updater: `d1` was active and nothing speaks against it."""
    updater = on_trial(replace_when_short=True)
    up, loading, loaded, serving = True, set[str](), {"d1", "d2"}, "d2"

    def carry_out(effects: list[Effect]) -> None:
        nonlocal serving
        for effect in effects:
            match effect:
                case LoadArtifact():
                    loading.add(effect.deployment_id)
                case ActivateArtifact():
                    assert effect.deployment_id in loaded, "what is not loaded can't answer"
                    serving = effect.deployment_id
                case UnloadArtifact():
                    gone = "d1" if effect.digest[0] == "a" else "d2"
                    loaded.discard(gone)
                    serving = "" if serving == gone else serving
                case Download():
                    updater.downloaded(effect.deployment_id)
                    carry_out(updater.verified(effect.deployment_id, good=True))
                case _:
                    pass

    def take() -> str | None:
        key = min(loading, default=None) if up else None
        loading.discard(key or "")
        return key

    for event in events:
        if event == "ready" and not up:
            up = True
            carry_out(updater.worker_ready())
        elif event in {"crash", "restart"}:
            up, serving = False, ""
            loading.clear()
            loaded.clear()
            if event == "crash":
                carry_out(updater.worker_crashed({}))
            else:
                updater = restarted(updater)
                up = True
                carry_out([*updater.recover(), *updater.worker_ready()])
        elif event in {"load", "fail", "short"} and (key := take()) is not None:
            if event == "load" or phase(updater, key) is Phase.ACTIVE:
                loaded.add(key)
                carry_out(updater.loaded(key))
            else:
                code = WireErrorCode.MEMORY_SHORT if event == "short" else WireErrorCode.GOLDEN_MISMATCH
                carry_out(updater.failed(key, code, "it does not do"))
        elif event in {"over", "bad"} and phase(updater, "d2") is Phase.PROBATION:
            carry_out(updater.probation_over("d2", problem="bad" if event == "bad" else None))
        proven = {key for key in ("d1", "d2") if phase(updater, key) is Phase.ACTIVE}
        assert len(proven) == 1
        if up:
            replaced = updater.records["d2"].replaces and phase(updater, "d2") is Phase.LOADING
            assert serving or loading, "nothing answers, and nothing will"
            assert serving in {*proven, "d2"} or replaced or proven <= loading
            if phase(updater, "d2") in {Phase.FAILED, Phase.ROLLED_BACK}:
                assert serving in {"d1", ""}, "what was taken back does not answer"


def ordered(*deployments: tuple[str, str]) -> list[DesiredDeployment]:
    return [DesiredDeployment(key, raw(manifest(digest))) for key, digest in deployments]


def test_what_a_bundle_orders_needs_no_server_and_no_second_judgement() -> None:
    updater = Updater({}, 0)
    assert updater.ordered(ordered(("bundle:x:1", "a"))) == [Download("bundle:x:1")]
    activated(updater, "bundle:x:1")
    assert updater.revision == 0
    assert updater.ordered(ordered(("bundle:x:1", "a"))) == [], "it runs already"
    assert updater.ordered(ordered(("bundle:x:2", "b"))) == [Download("bundle:x:2")]
    activated(updater, "bundle:x:2")
    assert phase(updater, "bundle:x:1") is Phase.SUPERSEDED
    assert updater.ordered(ordered(("bundle:x:1", "a"))) == [Download("bundle:x:1")], "it ended, and is tried anew"


def test_a_server_takes_off_only_what_it_knows_of() -> None:
    updater = Updater({}, 0)
    updater.ordered(ordered(("bundle:x:1", "a")))
    activated(updater, "bundle:x:1")
    updater.desired(desired(1))
    assert phase(updater, "bundle:x:1") is Phase.ACTIVE
    updater.desired(desired(2, ("one", "b")))
    activated(updater, "one")
    assert phase(updater, "bundle:x:1") is Phase.SUPERSEDED
    updater.desired(desired(3))
    assert phase(updater, "one") is Phase.SUPERSEDED


def test_bytes_are_counted_by_source_and_sources_are_bounded() -> None:
    updater = Updater({}, 0)
    updater.desired(desired(1, ("one", "a")))
    record = updater.records["one"]
    for number in range(100):
        record.count(f"peer {number}", 2)
    record.count("peer 0", 5)
    assert record.sources["peer 0"] == 7
    assert len(record.sources) == 16
    assert sum(record.sources.values()) == 205
