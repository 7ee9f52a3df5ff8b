"""What bundles on sticks are for on this device: a source of chunks; and, where it is offline, its orders.

An order counts when TUF metadata vouches for it: that in the bundle, judged by the same client and in the same folder
as what comes from the server. A device follows one order, by its name, of which trusted metadata lists one content; so
nobody can pick for it, and an older stick is refused as a rollback. It has no thread but the one that watches folders:
the supervisor calls `tick`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from agent.config import Config
from agent.protocol.bundle import BundleOrder
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.protocol.messages import DesiredDeployment, TrustNeed
from agent.update.bundle_file import Bundle, BundleError, BundlesSeen, BundleWatch, Held
from agent.update.journal import Journal
from agent.update.trust_ipc import Target
from agent.update.verify import TrustSaid, Verifier

log = logging.getLogger("agent.bundles")
DAY_S = 86_400.0
PREFIX = "bundle:"  # begins the ids of deployments that a bundle ordered
DEADLINE_S = 30 * DAY_S  # a stick may be away for long
JUDGING_S = 120.0
SERIAL = "bundle_serial:"  # begins the journal's names of the serials that were carried out


def bundle_folder(state_dir: Path) -> Path:
    """Where `shoal-agent bundle import` puts bundles."""
    return state_dir / "bundles"


class Connection(Protocol):
    """Whether verifying may go on: as of a link."""

    @property
    def connected(self) -> bool:
        """Whether it may."""
        ...


@dataclasses.dataclass(frozen=True)
class BundleTrustSaid:
    """A word of the process that verifies a bundle."""

    said: TrustSaid


class _Stick:
    """The bundle that is being judged, in the place of the link to a server."""

    def __init__(self, other: Connection) -> None:
        self.bundle: Bundle | None = None
        self._other = other

    @property
    def connected(self) -> bool:
        return self.bundle is not None and self._other.connected


class Bundles:
    """The bundles in the configured folders.

    Args:
        config: which folders, and whether this device is offline.
        journal: which orders were carried out.
        put: takes words of threads and processes.
        turn: `connected` says that nobody else uses the trusted metadata now.
        profiles: of what this device runs or ran.
        order: carries an order out: what is to run is trusted.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        put: Callable[[BundlesSeen | BundleTrustSaid], None],
        *,
        turn: Connection,
        profiles: Callable[[], set[str]],
        order: Callable[[list[DesiredDeployment]], None],
    ) -> None:
        self._config = config.sources
        self._journal = journal
        self._profiles = profiles
        self._order = order
        self._seen: tuple[Bundle, ...] = ()
        self._held: dict[str, Held] = {}
        self._done: set[tuple[int, ...]] = set()
        self._stick = _Stick(turn)
        self._judged: list[tuple[Manifest, msgspec.Raw]] = []
        self._until = 0.0
        folders = [bundle_folder(config.state_dir), *([Path(self._config.folder)] if self._config.folder else [])]
        self._watch = BundleWatch(folders, put)
        grace_s = self._config.days * DAY_S
        self._verifier = Verifier(
            dataclasses.replace(config, expired_grace_s=grace_s),
            self._stick,
            lambda said: put(BundleTrustSaid(said)),
            say_need=self._read_metadata,
            answered=self._answered,
            first_use=False,
        )

    @property
    def idle(self) -> bool:
        """Whether no bundle is being judged."""
        return self._verifier.idle

    def start(self) -> None:
        """Look through the folders from now on."""
        self._watch.start()

    def stop(self) -> None:
        """Look no more."""
        self._watch.stop()
        self._verifier.stop()

    def seen(self, bundles: tuple[Bundle, ...]) -> None:
        """These are there now."""
        self._seen = bundles
        self._held = {
            digest: Held(bundle.path, extent.offset, extent.size)
            for bundle in bundles
            for digest, extent in bundle.artifacts.items()
        }
        self._done &= {one.seen for one in bundles}
        if self._stick.bundle is not None and self._stick.bundle not in bundles:
            self._give_up("it was taken away")

    def held(self, digest: str) -> Held | None:
        """Where an artifact lies in a bundle; from any thread."""
        return self._held.get(digest)

    def said(self, word: BundleTrustSaid, now: float) -> None:
        """Take a word of the verifying process."""
        self._verifier.said(word.said, now)

    @property
    def busy(self) -> bool:
        """Whether an order is being judged."""
        return self._stick.bundle is not None or self._verifier.busy

    def tick(self, now: float) -> None:
        """Have the next order judged."""
        if self._stick.bundle is not None and now > self._until:
            self._give_up("its metadata is not complete, or can't be read")
        if self._config.offline and self._stick.bundle is None:
            self._take_next(now)
        self._verifier.tick(now)

    def _give_up(self, why: str) -> None:
        bundle, self._stick.bundle = self._stick.bundle, None
        assert bundle is not None
        log.error("the order in %s was not carried out: %s", bundle.path, why)
        self._verifier.cancel(PREFIX)
        self._done.add(bundle.seen)

    def _take_next(self, now: float) -> None:
        for bundle in self._seen:
            if bundle.seen in self._done:
                continue
            order = bundle.index.read_order()
            if order.name != self._config.bundle or order.serial <= self._carried_out(order):
                self._done.add(bundle.seen)
                continue
            mine = self._mine(bundle)
            if not mine:
                self._done.add(bundle.seen)
                continue
            targets = [Target(order.target_path, bytes(bundle.index.order))]
            targets += [Target(manifest.target_path, bytes(signed)) for manifest, signed in mine]
            log.info("judging order %r, serial %d, of %s", order.name, order.serial, bundle.path)
            self._stick.bundle, self._judged, self._until = bundle, mine, now + JUDGING_S
            self._verifier.link_up()  # what failed before was another bundle
            self._verifier.check(PREFIX, tuple(targets))
            return

    def _read_metadata(self, need: TrustNeed) -> None:
        if self._stick.bundle is None:
            return
        try:
            self._verifier.piece(self._stick.bundle.piece(need.file, need.offset))
        except BundleError as error:
            log.warning("%s", error)  # asked again, as of a server that does not answer

    def _answered(self, _key: str, code: WireErrorCode | None, detail: str) -> None:
        bundle, self._stick.bundle = self._stick.bundle, None
        assert bundle is not None
        self._done.add(bundle.seen)
        if code is not None:
            log.error("the order in %s is refused (%s): %s", bundle.path, code.value, detail)
            return
        order = bundle.index.read_order()
        self._order(
            [
                DesiredDeployment(_deployment_id(order, manifest), signed, order.probation_s, DEADLINE_S)
                for manifest, signed in self._judged
            ]
        )
        self._journal.keep_number(SERIAL + order.name, order.serial)

    def _carried_out(self, order: BundleOrder) -> int:
        return int(self._journal.number(SERIAL + order.name, 0))

    def _mine(self, bundle: Bundle) -> list[tuple[Manifest, msgspec.Raw]]:
        """What of an order is for this device: the manifests of its profile, with their bytes."""
        pairs = list(zip(bundle.index.read_manifests(), bundle.index.manifests, strict=True))
        profile = self._profile({manifest.profile for manifest, _ in pairs})
        if profile is None:
            log.error(
                "the order in %s is for several profiles: name this device's in the configuration (bundles.profile)",
                bundle.path,
            )
            return []
        mine = [(manifest, signed) for manifest, signed in pairs if manifest.profile == profile]
        models = {manifest.model for manifest, _ in mine}
        if not mine or len(models) != len(mine):
            log.error("the order in %s has nothing, or two of a model, for profile %r", bundle.path, profile)
            return []
        return mine

    def _profile(self, offered: set[str]) -> str | None:
        """This device's profile: as configured, that of what it ran, or the only one there is."""
        if self._config.profile:
            return self._config.profile
        known = offered & self._profiles()
        candidates = known or offered
        return next(iter(candidates)) if len(candidates) == 1 else None


def _deployment_id(order: BundleOrder, manifest: Manifest) -> str:
    """The same for the same artifact in the same order, of whatever serial: what runs already is left alone."""
    mark = hashlib.sha256(f"{manifest.target_path}:{manifest.digest}".encode()).hexdigest()[:16]
    return f"{PREFIX}{order.name}:{mark}"
