"""The updater: what follows from each event, without any I/O."""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import DesiredDeployment, DesiredState
from agent.protocol.version import SPOKEN
from agent.update.updater import (
    ATTEMPTS,
    ActivateArtifact,
    BeginProbation,
    CheckTrust,
    Download,
    LoadArtifact,
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
    assert updater.loaded("d1") == [ActivateArtifact("d1"), BeginProbation("d1", 5.0)]
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
    updater.worker_crashed()
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
