"""Orders to devices without a server: what they are to run, signed, with everything that they need to judge it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.bundle import ENTRIES
from agent.protocol.manifest import Manifest
from fleet_server import audit
from fleet_server.catalog.service import is_proven, ready_variant, resolve_version
from fleet_server.devices.service import get_profile
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import Fleet, Variant
from fleet_server.principals import Who
from fleet_server.rollouts import repository
from fleet_server.rollouts.schemas import BundleArtifact, BundleCreate, BundleFile, BundleView
from fleet_server.settings import Settings
from fleet_server.trust import service as trust
from fleet_server.trust.metadata import BUNDLES, model_role


def create(session: Session, settings: Settings, fleet_id: str, wanted: BundleCreate, *, actor: Who) -> BundleView:
    """An order for variants that passed the gate. It replaces an earlier one of its name.

    Raises:
        NotFoundError: for a version or a profile that is not there.
        ConflictError: when a profile has no variant that may be rolled out, manifests wait for signatures, or the
            fleet wants approvals that nobody could give here.
    """
    _check_approvals(session, settings, fleet_id)
    manifests: list[Manifest] = []
    for reference in wanted.versions:
        manifests += _manifests(session, fleet_id, reference, wanted)
    models = {(one.model, one.profile) for one in manifests}
    if len(models) != len(manifests):
        raise InvalidError("model_twice", "versions: names two versions of a model: one a model", field="versions")
    if len(manifests) > ENTRIES:
        detail = f"profiles: {len(manifests)} manifests, and a bundle holds {ENTRIES}: name fewer profiles"
        raise InvalidError("bundle_too_large", detail, field="profiles")
    paths = [trust.want(session, fleet_id, one) for one in manifests]
    trust.require_signed(session, settings, fleet_id, paths, ", ".join(wanted.versions))
    probation_s = settings.probation_s if wanted.probation_s is None else wanted.probation_s
    order = trust.want_order(session, fleet_id, wanted.name, paths, probation_s)
    signed = trust.sign_waiting(session, settings, fleet_id, order.target_path)
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="bundle.create",
        subject=f"bundle/{order.name}",
        detail={"serial": order.serial, "versions": list(wanted.versions), "signed": signed},
    )
    return _view(session, fleet_id, msgspec.json.encode(order), order.name, order.serial, manifests, signed=signed)


def _check_approvals(session: Session, settings: Settings, fleet_id: str) -> None:
    """A bundle that leaves can't be approved any more: its signature is what stands for that."""
    if session.get_one(Fleet, fleet_id).approvals and trust.signs_by_itself(session, settings, fleet_id):
        raise ConflictError(
            "approvals_needed",
            "this fleet wants approvals for what devices run, and a bundle would have none: keep the targets keys with "
            "people (`shoal trust init`), who then sign every order",
        )


def _manifests(session: Session, fleet_id: str, reference: str, wanted: BundleCreate) -> list[Manifest]:
    version = resolve_version(session, fleet_id, reference)
    if wanted.profiles:
        profiles = {name: get_profile(session, fleet_id, name).id for name in wanted.profiles}
    else:
        profiles = repository.profiles_of(session, version.id)
    found: dict[str, Variant] = {}
    for name, profile_id in profiles.items():
        variant = ready_variant(session, version.id, profile_id)
        if variant is not None:
            found[name] = variant
    missing = sorted(set(profiles) - set(found)) if wanted.profiles else []
    if missing or not found:
        raise ConflictError(
            "no_variant_for_profile",
            f"{reference} has no variant that passed the gate for {', '.join(missing) or 'any profile'}: see `shoal "
            f"variant list --version {reference}`",
        )
    unproven = sorted(name for name, one in found.items() if not wanted.allow_unproven and not is_proven(one))
    if unproven:
        raise ConflictError(
            "variant_unproven",
            f"{reference} was measured on the server only for {', '.join(unproven)}: measure it on a device with "
            f"`shoal gate run {reference} --profile {unproven[0]}`, or allow it (--allow-unproven)",
        )
    return [msgspec.convert(one.manifest, Manifest) for one in found.values()]


def _view(
    session: Session,
    fleet_id: str,
    order: bytes,
    name: str,
    serial: int,
    manifests: Sequence[Manifest],
    *,
    signed: bool,
) -> BundleView:
    roles = [BUNDLES, *sorted({model_role(one.model) for one in manifests})]
    metadata = trust.chain(session, fleet_id, roles) if signed else {}
    bodies = [trust.manifest_as_signed(session, fleet_id, one.target_path) for one in manifests]
    artifacts = {content.digest: content.size for one in manifests for content in one.contents}
    return BundleView(
        name=name,
        serial=serial,
        fleet=fleet_id,
        signed=signed,
        order=order.decode(),
        manifests=[body.decode() for body in bodies if body is not None],
        metadata=[BundleFile(file=file, body=body.decode()) for file, body in metadata.items()],
        artifacts=[BundleArtifact(digest=digest, size=size) for digest, size in artifacts.items()],
    )
