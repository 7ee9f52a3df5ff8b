"""The agent's own releases: fetches one, unpacks it, waits for its moment, and leaves; or proves itself.

Called by the supervisor's main loop only. What is decided is `agent.releases.book`; what starts versions, and takes
them back, is `agent.launcher`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent import __version__
from agent.config import Config
from agent.database import DatabaseError
from agent.files import storage_code
from agent.launcher import COMMAND, RELEASE, SEPARATOR
from agent.protocol.delivery import Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import AgentFacts
from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.messages import DeploymentReport
from agent.protocol.release import DesiredRelease, ReleaseManifest, misfit, own_platform
from agent.releases.book import ReleaseBook, ReleaseRecord
from agent.releases.folder import BundleError, ReleaseFolder, Trial, place_of, same
from agent.source_config import SourceKind
from agent.update.fetcher import Fetcher
from agent.update.journal import Journal
from agent.update.pace import Pacer
from agent.update.retriever import Connection, Retriever
from agent.update.store import ArtifactStore
from agent.update.trust_ipc import Target

log = logging.getLogger("agent.releases")
KEY = "release:"  # begins the key of a release's trust check; a deployment's is its id
NOTE = "releases"
WORKING = frozenset({Phase.VERIFYING, Phase.LOADING, Phase.PROBATION})
LIVE_S = 1.0  # that everything must hold before a version says that it has proved itself


@dataclass(frozen=True)
class Unpacked:
    """A bundle was looked at and unpacked, or why not; `damaged`: it is not what its digest says, and is gone."""

    deployment_id: str
    code: WireErrorCode | None = None
    detail: str = ""
    damaged: bool = False


@dataclass(frozen=True)
class Start:
    """How this agent was started.

    Attributes:
        launcher: the number of its launcher; 0 where none did.
        installed: the version that is installed on the device.
        path: PYTHONPATH of the launcher.
        command: that starts the launcher again.
        running: the folder of the release that runs; empty for what is installed.
    """

    launcher: int
    installed: str
    path: str
    command: tuple[str, ...]
    running: str

    @staticmethod
    def read(environment: Mapping[str, str]) -> Start:
        """What the launcher said."""
        number, installed, path, *command = (environment.get(COMMAND) or "0" + SEPARATOR * 2).split(SEPARATOR)
        known = int(number) if number.isdigit() and command else 0
        return Start(known, installed or __version__, path, tuple(command), environment.get(RELEASE, ""))


class Device(Protocol):
    """What proving itself needs to know of the agent."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        ...

    def unready(self) -> str:
        """What keeps its models from being served as they ought to be, in a few words; empty when nothing does."""
        ...

    def serving(self) -> dict[str, str]:
        """Digests by model, of what answers requests."""
        ...

    def occupied(self) -> str:
        """What must be over before the agent may end, in a few words; empty when nothing must."""
        ...

    def leave(self) -> None:
        """End, and become the launcher."""
        ...

    def proved(self) -> None:
        """The version that runs is no trial any more."""
        ...


class Releases:
    """The agent's releases.

    Args:
        config: where they lie, and whether the agent may update itself.
        start: how this agent was started.
        journal: where the book is kept.
        store: where bundles are.
        fetcher: fetches what travels.
        pacer: says when a new version may be tried.
        link: whether there is one.
        put: takes what a thread found out, for `unpacked`.
        check_trust: finds out whether a manifest was signed; the answer comes by `trust_answered`.
        cancel_trust: it need not be known any more.
        changed: something is to be reported.
        device: the rest of the agent.
    """

    def __init__(
        self,
        config: Config,
        start: Start,
        journal: Journal,
        store: ArtifactStore,
        fetcher: Fetcher,
        pacer: Pacer,
        link: Connection,
        put: Callable[[Any], None],
        *,
        check_trust: Callable[[str, tuple[Target, ...]], None],
        cancel_trust: Callable[[str], None],
        changed: Callable[[], None],
        device: Device,
    ) -> None:
        self._config = config
        self._start = start
        self._journal, self._store, self._fetcher, self._pacer = journal, store, fetcher, pacer
        self._put, self._changed, self._device = put, changed, device
        self._check_trust, self._cancel_trust = check_trust, cancel_trust
        self._folder = ReleaseFolder(config.state_dir / "agent", start.running)
        self._retriever: Retriever[ReleaseRecord] = Retriever(store, fetcher, link, lambda _: self._save())
        self._book = ReleaseBook(journal.note(NOTE))
        self._trial = self._folder.trial if start.launcher else None
        self._waits, self._good_since = "", 0.0
        self._unpacking = self._unpacked = ""  # deployments

    # -- what others ask

    @property
    def facts(self) -> AgentFacts:
        """What the server must know to send a release."""
        update = "off" if not self._config.self_update else ("on" if self._start.launcher else "unavailable")
        return AgentFacts(own_platform(), update, self._folder.running, self._start.launcher, self._start.installed)

    @property
    def on_trial(self) -> bool:
        """Whether this agent has yet to prove itself: it does nothing new until then."""
        return self._trial is not None

    @property
    def busy(self) -> bool:
        """Whether something goes on that must be looked after often."""
        record = self._book.open
        working = record is not None and record.phase in WORKING and record.waiting is None
        return self.on_trial or self._retriever.busy or working

    def reports(self) -> tuple[DeploymentReport, ...]:
        """The deployments of releases."""
        record = self._book.open
        download = self._retriever.progress(record.deployment_id) if record is not None else None
        return self._book.reports(download.part.missing if download else 0)

    def kept_digests(self) -> set[str]:
        """What must stay in the store."""
        record = self._book.open
        if record is None or record.release is None:
            return set()
        left = [one for one in record.encodings if one.digest not in record.failed_encodings]
        return {record.digest, *(digest for one in left for digest in (one.digest, one.base) if digest)}

    def useful_digests(self) -> list[str]:
        """What may stay: the bundle of what runs, for peers, and for differences to build on."""
        return [one for one in (self._folder.current,) if one]

    # -- what happens

    def begin(self) -> None:
        """Take up what an earlier agent left."""
        if self._book.lost:
            log.error(self._book.lost)
        running, current = self._folder.running, self._folder.current
        if self._start.launcher and not self.on_trial and current and not running:
            self._installed_again(current)
            current = ""
        record = self._book.open
        self._book.recover(
            running=running,
            current=current,
            on_trial=self.on_trial,
            failed=self._folder.failed(record.deployment_id) if record is not None else None,
        )
        if record is not None and record.failure is not None and record.phase in SETTLED:
            log.error("%s was taken back: %s", record.label, record.failure.detail)
        self._save()
        if not self.on_trial:
            self._folder.collect(self._releases_kept())
        if (record := self._book.open) is not None and record.phase is Phase.PENDING:
            self._begin(record)

    def _installed_again(self, current: str) -> None:
        """What is installed runs, and not the release that had proved itself."""
        active = next((one for one in self._book.records.values() if one.phase is Phase.ACTIVE), None)
        if self._folder.has(current):
            log.warning("another agent, %s, was installed: it runs, and not the release from before", __version__)
            after = Phase.SUPERSEDED
        else:
            log.error("the release that ran is damaged on the disk: what is installed runs until it has come again")
            after = Phase.PENDING
        self._folder.forget()
        if active is not None and active.digest == current:
            self._book.set(active, after)

    def desired(self, wanted: DesiredRelease | None) -> None:
        """Accept what is wanted of the agent."""
        gone, fresh = self._book.desired(wanted)
        if gone is not None:
            self._retriever.cancel(gone.deployment_id)
            self._cancel_trust(KEY + gone.deployment_id)
        self._save()
        if fresh is None:
            return
        if fresh.phase is Phase.DOWNLOADING:
            self._retriever.begin(fresh, self, time.monotonic())
        else:
            self._begin(fresh)

    def trust_answered(self, key: str, code: WireErrorCode | None, detail: str) -> None:
        """A release's manifest was judged."""
        record = self._book.records.get(key.removeprefix(KEY))
        if record is None or record.phase is not Phase.PENDING:
            return
        if code is not None:
            self._fail(record, code, detail)
            return
        record.trusted = True
        self._begin(record)

    def unpacked(self, event: Unpacked) -> None:
        """A thread has unpacked a bundle, or could not."""
        self._unpacking = ""
        record = self._book.records.get(event.deployment_id)
        if record is None or record.phase is not Phase.LOADING:
            return
        if event.damaged and not record.refetched:
            record.refetched = True
            self._book.set(record, Phase.DOWNLOADING)
            self._save()
            self._retriever.begin(record, self, time.monotonic())
        elif event.code is not None:
            self._fail(record, event.code, event.detail)
        else:
            self._unpacked = record.deployment_id

    def tick(self, now: float) -> None:
        """Prove itself; go on with what is under way."""
        if self._trial is not None:
            self._prove(self._trial, now)
            return
        self._retriever.tick(now)
        record = self._book.open
        if record is not None and record.phase in WORKING and self._unpacked == record.deployment_id:
            self._try(record)

    def stop(self) -> None:
        """End what is being decoded."""
        self._retriever.stop()

    # -- what the retriever says

    def received(self, key: str, count: int, source: str) -> None:
        """Bytes came; those of a stick came over no network."""
        record = self._book.records[key]
        record.count(source, count)
        record.received_bytes += 0 if source.startswith(SourceKind.USB.value) else count

    def waits(self, key: str, waiting: Waiting | None) -> None:
        """What is fetched must wait, or goes on."""
        record = self._book.records.get(key)
        if record is not None and record.waiting != waiting:
            record.waiting, self._book.changed = waiting, True
            self._save()

    def fetched(self, key: str) -> None:
        """A bundle came."""
        record = self._book.records[key]
        if record.phase is Phase.DOWNLOADING:
            self._book.set(record, Phase.VERIFYING)
            self._load(record)

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        """A bundle will not come."""
        self._fail(self._book.records[key], code, detail)

    # -- steps

    def _begin(self, record: ReleaseRecord) -> None:
        failed, release = self._folder.failed(record.deployment_id), record.release
        if failed is not None:  # it is told anew, of a journal that was lost; it is not tried anew
            self._book.taken_back(record, failed)
            self._save()
        elif (unable := self._unable()) is not None:
            self._fail(record, *unable)
        elif release is not None and not record.trusted:
            self._check_trust(KEY + record.deployment_id, (Target(release.target_path, record.signed),))
        elif record.digest == self._folder.running == self._folder.current:
            self._pass(record, Phase.LOADING, Phase.PROBATION, Phase.ACTIVE)
        elif release is None:
            self._unpacked = record.deployment_id
            self._pass(record, Phase.LOADING)
        elif (unfit := self._misfit(release)) is not None:
            self._fail(record, *unfit)
        elif self._folder.has(release.digest):
            self._load(record)
        else:
            self._pass(record, Phase.DOWNLOADING)
            self._retriever.begin(record, self, time.monotonic())

    def _unable(self) -> tuple[WireErrorCode, str] | None:
        why = {
            "off": 'its owner\'s configuration says self_update = "off": who brings its package or image updates it',
            "unavailable": "it was not started by its launcher: start it with the command shoal-agent",
        }.get(self.facts.self_update)
        return (WireErrorCode.RELEASE_UNFIT, f"this device does not update itself: {why}") if why else None

    def _misfit(self, release: ReleaseManifest) -> tuple[WireErrorCode, str] | None:
        return misfit(release, platform=own_platform(), launcher=self._start.launcher, version=__version__)

    def _load(self, record: ReleaseRecord) -> None:
        """Unpack a bundle, in a thread: thousands of files are written."""
        self._pass(record, Phase.LOADING)
        release = record.release
        if release is None or self._unpacking == record.deployment_id:
            return
        self._unpacking = record.deployment_id
        thread = threading.Thread(target=self._unpack, args=(record.deployment_id, release), daemon=True)
        thread.start()

    def _unpack(self, deployment_id: str, release: ReleaseManifest) -> None:
        """In a thread of its own."""
        done = Unpacked(deployment_id)
        try:
            if not self._folder.has(release.digest):
                done = self._unpack_bundle(deployment_id, release)
        except OSError as error:
            done = Unpacked(deployment_id, storage_code(error), f"it can't be unpacked: {error.strerror or error}")
        except BundleError as error:
            done = Unpacked(deployment_id, WireErrorCode.RELEASE_UNFIT, f"it can't be unpacked: {error}")
        self._put(done)

    def _unpack_bundle(self, deployment_id: str, release: ReleaseManifest) -> Unpacked:
        if not self._store.verify(release.digest):
            detail = "the bytes that came, twice, are not those of the manifest's digest; they were thrown away"
            return Unpacked(deployment_id, WireErrorCode.DIGEST_MISMATCH, detail, damaged=True)
        self._folder.collect(self._releases_kept())
        needed = release.info.unpacked + int(self._config.disk_floor_mb * 2**20)
        if (lacking := needed - self._folder.free()) > 0:
            short, whole = -(-lacking // 2**20), -(-release.info.unpacked // 2**20)
            detail = (
                f"{self._config.state_dir} lacks {short} MiB for the {whole} MiB that it takes unpacked: free that, or "
                "lower disk_floor_mb"
            )
            return Unpacked(deployment_id, WireErrorCode.DISK_FULL, detail)
        self._folder.add(release.digest, self._store.path(release.digest), release.info)
        return Unpacked(deployment_id)

    def _try(self, record: ReleaseRecord) -> None:
        """Leave for another version, when its moment has come."""
        waiting = self._pacer.activation(record.delivery)
        if waiting != record.waiting:
            record.waiting, self._book.changed = waiting, True
            self._save()
        if waiting is not None or not self._device.connected or self._device.occupied():
            return
        release = record.release
        trial = Trial(
            record.deployment_id,
            place_of(record.digest),
            release.info.version if release else self._start.installed,
            record.confirm_s,
            record.most_starts,
            self._device.serving(),
        )
        self._pass(record, Phase.PROBATION)
        if self._book.changed:
            return  # nothing is done that is not written down: that is tried again at the next look
        try:
            self._folder.set_next(trial, self._start.installed)
        except OSError as error:
            self._fail(record, storage_code(error), f"it can't be tried: {error.strerror or error}")
            return
        log.warning("%s is tried now; this agent, %s, ends", record.label, __version__)
        self._device.leave()

    def _prove(self, trial: Trial, now: float) -> None:
        missing = self._missing(trial)
        if missing:
            self._good_since = 0.0
        elif not self._good_since:
            self._good_since = now
        if missing != self._waits:
            self._waits = missing
            self._folder.waits(missing)
        if missing or now - self._good_since < LIVE_S:
            return
        self._folder.confirm()
        self._trial = None
        log.warning("agent %s has proved itself", trial.version)
        record = self._book.records.get(trial.deployment_id)
        if record is not None and record.phase is Phase.PROBATION:
            self._pass(record, Phase.ACTIVE)
        self._folder.collect(self._releases_kept())
        self._device.proved()
        self._changed()

    def _missing(self, trial: Trial) -> str:
        if not self._device.connected:
            return "it has no connection to the broker"
        if unready := self._device.unready():
            return unready
        serving = self._device.serving()
        if not same(serving, trial.serving):
            return "it does not serve what was served before: " + ", ".join(
                sorted(model for model, digest in trial.serving.items() if serving.get(model) != digest)
            )
        return ""

    def _pass(self, record: ReleaseRecord, *phases: Phase) -> None:
        for phase in phases:
            self._book.set(record, phase)
        self._save()

    def _fail(self, record: ReleaseRecord, code: WireErrorCode, detail: str) -> None:
        if record.phase not in SETTLED:
            log.error("%s is not run (%s): %s", record.label, code.value, detail)
        self._book.fail(record, code, detail)
        self._save()

    def _save(self) -> None:
        """Write the book; what can't be written now is, with the next change or look."""
        self._changed()
        if not self._book.changed:
            return
        try:
            self._journal.keep_note(NOTE, self._book.packed())
            self._book.changed = False
        except DatabaseError as error:
            log.error("%s", error.detail)  # noqa: TRY400

    def keep_all(self) -> None:
        """The journal was lost: write all of it again."""
        self._book.changed = True
        self._save()

    def _releases_kept(self) -> set[str]:
        record = self._book.open
        return {record.digest} if record is not None and record.digest else set()
