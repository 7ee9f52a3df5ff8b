"""Rules of releases of the agent.

A release is a version of the agent, a bundle of it what a platform gets: rows of the same tables as models' versions
and variants, so that one engine rolls both out (docs/decisions/033).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS
from agent.protocol.release import AGENT, ReleaseInfo, ReleaseManifest, fits_platform
from fleet_server import audit
from fleet_server.agent_releases import repository
from fleet_server.agent_releases.bundle import read_bundle
from fleet_server.agent_releases.schemas import AgentBundleView, AgentReleaseView
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import VariantState
from fleet_server.catalog.service import discard_uploads, resolve_version
from fleet_server.db import Database
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Device, Model, Profile, Variant, Version
from fleet_server.preconditions import Precondition
from fleet_server.principals import Who
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

UNABLE = {
    "off": 'their owners\' configuration says self_update = "off"',
    "unavailable": "their agents were not started by the command shoal-agent",
    "": "their agents are from before there were releases: install a newer one once",
}


def push(
    database: Database, store: ArtifactStore, settings: Settings, fleet_id: str, digest: str, *, actor: Who
) -> AgentReleaseView:
    """Add an uploaded bundle to its release; the same one pushed again is answered as it is.

    Raises:
        InvalidError: when it was not uploaded, or is no bundle.
        ConflictError: when the release has another bundle for its platform, or a name is taken.
    """
    with database.read() as session:
        if catalog.blob(session, fleet_id, digest) is None:
            detail = f"digest: {digest[:12]}… was not uploaded, or is gone: upload it first"
            raise InvalidError("upload_not_found", detail, field="digest")
    with tempfile.TemporaryDirectory(dir=settings.state_dir) as folder:
        path = Path(folder) / "bundle"
        store.fetch_to(digest, path)
        info, size = read_bundle(path), path.stat().st_size
    with database.write() as session:
        version = _version(session, fleet_id, info.version)
        platform = _platform(session, fleet_id, info.platform)
        manifest = ReleaseManifest(digest, size, LIMITS.chunk_bytes, info)
        known = catalog.variant_of(session, version.id, platform.id)
        if known is not None and known.digest != digest:
            raise ConflictError(
                "release_exists",
                f"{AGENT}@{info.version} has another bundle for {info.platform}, and releases are immutable: push it "
                "under another version",
            )
        if known is None:
            _add(session, fleet_id, version, platform, manifest, actor=actor)
        trust.sign_waiting(session, settings, fleet_id, manifest.target_path)
        return view(session, version)


def _version(session: Session, fleet_id: str, name: str) -> Version:
    agent = repository.agent(session, fleet_id)
    if agent is None:
        if catalog.model(session, fleet_id, AGENT) is not None:
            raise ConflictError("name_taken", f"a model is called {AGENT}: push its versions under another name first")
        agent = Model(fleet_id=fleet_id, name=AGENT, kind=repository.AGENT_KIND)
        session.add(agent)
        session.flush()
    version = repository.release(session, fleet_id, name)
    if version is None:
        version = Version(fleet_id=fleet_id, model_id=agent.id, name=name, inputs=[], outputs=[])
        session.add(version)
        session.flush()
    return version


def _platform(session: Session, fleet_id: str, name: str) -> Profile:
    found = repository.platform(session, fleet_id, name)
    if found is None:
        found = Profile(fleet_id=fleet_id, name=name, kind=repository.PLATFORM_KIND, spec={"platform": name})
        session.add(found)
        session.flush()
    return found


def _add(
    session: Session, fleet_id: str, version: Version, platform: Profile, manifest: ReleaseManifest, *, actor: Who
) -> None:
    session.add(
        Variant(
            fleet_id=fleet_id,
            version_id=version.id,
            profile_id=platform.id,
            profile_spec=dict(platform.spec),
            state=VariantState.READY.value,
            digest=manifest.digest,
            size=manifest.size,
            manifest=msgspec.to_builtins(manifest),
        )
    )
    trust.want_release(session, fleet_id, manifest)
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="agent_release.create",
        subject=f"agent-release/{manifest.info.version}",
        detail={"platform": manifest.info.platform, "digest": manifest.digest},
    )
    session.flush()


def delete(
    database: Database,
    store: ArtifactStore,
    fleet_id: str,
    name: str,
    *,
    actor: Who,
    unchanged: Precondition,
) -> None:
    """Remove a release that was never rolled out, with its bundles.

    Raises:
        NotFoundError: when it is not there.
        ConflictError: when a rollout names it.
        PreconditionFailedError: when it is not as `unchanged` asks.
    """
    with database.write() as session:
        version = get(session, fleet_id, name)
        unchanged.check(session, version, lambda: view(session, version))
        if catalog.is_rolled_out(session, version.id):
            raise ConflictError(
                "version_in_use", f"{AGENT}@{name} was rolled out, and rollouts keep their history: it stays"
            )
        for variant, _ in repository.bundles(session, version.id):
            trust.forget_release(session, fleet_id, manifest_of(variant))
        digests = catalog.delete_version(session, version)
        audit.record(
            session, fleet_id=fleet_id, actor=actor, action="agent_release.delete", subject=f"agent-release/{name}"
        )
    discard_uploads(database, store, fleet_id, digests)


def get(session: Session, fleet_id: str, name: str) -> Version:
    """One release.

    Raises:
        NotFoundError: when it is not there.
    """
    found = repository.release(session, fleet_id, name)
    if found is None:
        raise NotFoundError("agent_release", name, remedy="list them with `shoal agent-release list`")
    return found


def resolve(session: Session, fleet_id: str, reference: str) -> Version:
    """The version that `model@version` names, or the release that `shoal-agent@version` does.

    Raises:
        InvalidError: when it is not written so.
        NotFoundError: when it is not there.
    """
    name, _, version = reference.partition("@")
    return get(session, fleet_id, version) if name == AGENT else resolve_version(session, fleet_id, reference)


def is_release(session: Session, version: Version) -> bool:
    """Whether a version is one of the agent."""
    return session.get_one(Model, version.model_id).kind == repository.AGENT_KIND


def manifest_of(variant: Variant) -> ReleaseManifest:
    """What a bundle is."""
    return msgspec.convert(variant.manifest, ReleaseManifest)


def bundle_for(bundles: Sequence[tuple[Variant, Profile]], device: Device) -> Variant | None:
    """What a device gets of a release; None where there is none for its platform."""
    here = str(device.facts.get("agent", {}).get("platform", ""))
    return next((variant for variant, platform in bundles if fits_platform(platform.name, here)), None)


def unable(device: Device) -> str:
    """Why a device can't become another release by itself; empty when it can."""
    said = str(device.facts.get("agent", {}).get("self_update", ""))
    return "" if said == "on" else UNABLE.get(said, UNABLE["unavailable"])


def view(session: Session, version: Version) -> AgentReleaseView:
    """The HTTP shape of a release."""
    return views(session, version.fleet_id, [version])[version.id]


def views(session: Session, fleet_id: str, versions: Sequence[Version]) -> dict[str, AgentReleaseView]:
    """The HTTP shapes of releases, by the ids of their versions: devices are counted, and signatures read, once."""
    bundles = {one.id: [manifest_of(variant) for variant, _ in repository.bundles(session, one.id)] for one in versions}
    digests = [manifest.digest for found in bundles.values() for manifest in found]
    running = repository.running(session, fleet_id, digests)
    published = trust.state(session, fleet_id)
    return {
        one.id: AgentReleaseView(
            version=one.name,
            reference=f"{AGENT}@{one.name}",
            bundles=[_bundle_view(session, fleet_id, manifest, published) for manifest in bundles[one.id]],
            devices=sum(running.get(manifest.digest, 0) for manifest in bundles[one.id]),
            created_at=one.created_at,
        )
        for one in versions
    }


def _bundle_view(
    session: Session, fleet_id: str, manifest: ReleaseManifest, published: trust.State | None
) -> AgentBundleView:
    info: ReleaseInfo = manifest.info
    return AgentBundleView(
        platform=info.platform,
        digest=manifest.digest,
        size=manifest.size,
        unpacked=info.unpacked,
        launcher=info.launcher,
        after=info.after,
        signed=published is not None and trust.signs(session, published, fleet_id, manifest.target_path),
    )
