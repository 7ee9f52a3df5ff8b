"""What trials leave on the disk of a device: nothing that nobody needs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.protocol.manifest import DataFile, Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import Need, Trial
from agent.trial.trials import Trials
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.store import ArtifactStore

TENSOR = TensorSpec("x", "float32", (-1, 8))
DATA = DataFile("d" * 64, 10, 4)
CANDIDATE = Manifest(
    digest="a" * 64, size=1, chunk_size=1, model="m", version="1", variant_id="v", profile="p",
    format=ModelFormat.ONNX, runtime=RuntimeName.ONNX, precision=Precision.FP32, inputs=(TENSOR,), outputs=(TENSOR,),
)  # fmt: skip
SIGNED = msgspec.Raw(msgspec.json.encode(CANDIDATE))


class Link:
    connected = False

    def listen_to_broadcast(self, digest: str) -> None:
        pass

    def stop_listening(self, digest: str) -> None:
        pass

    def say_need(self, need: Need) -> None:
        pass


def trials(folder: Path, store: ArtifactStore, journal: Journal) -> Trials:
    found = Trials(
        folder / "trials",
        store,
        journal,
        Fetcher(store, Link(), str(folder)),
        {},
        changed=lambda: store.collect_garbage(found.kept_digests()),
        check_trust=lambda trial: found.trust_answered(trial.trial_id, None, ""),
    )
    return found


def test_files_of_a_cancelled_trial_go_at_once(tmp_path: Path) -> None:
    store, journal = ArtifactStore(tmp_path / "artifacts"), Journal(tmp_path / "journal.db")
    one = trials(tmp_path, store, journal)
    one.desired((Trial("t", (SIGNED,), DATA),))
    one.tick(0.0)
    one.tick(0.1)
    assert {path.suffix for path in (tmp_path / "artifacts").iterdir()} == {".part", ".have"}
    (tmp_path / "trials" / "t").mkdir(parents=True)
    one.desired(())
    assert not list((tmp_path / "artifacts").iterdir())
    assert not list((tmp_path / "trials").iterdir())
    assert not journal.trials()
    journal.close()


def test_folders_of_trials_that_were_forgotten_before_a_crash_go_at_the_next_start(tmp_path: Path) -> None:
    store, journal = ArtifactStore(tmp_path / "artifacts"), Journal(tmp_path / "journal.db")
    trials(tmp_path, store, journal).desired((Trial("kept", (SIGNED,), DATA),))
    for name in ("kept", "gone"):
        (tmp_path / "trials" / name).mkdir(parents=True)
    trials(tmp_path, store, journal)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["kept"]
    journal.close()
