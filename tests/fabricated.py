"""Versions that are ready to be rolled out, without a build: rows, and bytes that no runtime would load."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.models import Model, Profile, Variant, Version
from fleet_server.principals import DEFAULT_FLEET

TENSOR = TensorSpec("x", "float32", (-1, 8))
CHUNK = LIMITS.chunk_bytes  # as the server cuts everything


def fabricate(
    database: Database, artifacts: ArtifactStore, folder: Path, model: str, version: str, *, size: int = 600_000
) -> None:
    """A version of a model with a ready variant for every profile there is."""
    content = (f"{model}@{version} ".encode() * size)[:size]
    file = folder / f"{model}-{version}"
    file.write_bytes(content)
    digest, _ = artifacts.put_file(file)
    with database.write() as session:
        known = session.query(Model).filter_by(name=model).first()
        found = known or Model(fleet_id=DEFAULT_FLEET, name=model)
        session.add(found)
        session.flush()
        row = Version(fleet_id=DEFAULT_FLEET, model_id=found.id, name=version, inputs=[], outputs=[])
        session.add(row)
        session.flush()
        for profile in session.query(Profile).all():
            runtime = RuntimeName(profile.spec["runtime"])
            variant = Variant(
                fleet_id=DEFAULT_FLEET,
                version_id=row.id,
                profile_id=profile.id,
                profile_spec=profile.spec,
                state="ready",
                measurements={"accuracy": 0.9, "memory_mb": 40.0},
            )
            session.add(variant)
            session.flush()
            manifest = Manifest(
                digest=digest,
                size=size,
                chunk_size=CHUNK,
                model=model,
                version=version,
                variant_id=variant.id,
                profile=profile.name,
                format=ModelFormat.ONNX if runtime is RuntimeName.ONNX else ModelFormat.TFLITE,
                runtime=runtime,
                precision=Precision.FP32,
                inputs=(TENSOR,),
                outputs=(TENSOR,),
                providers=("cpu",),
            )
            variant.digest, variant.size, variant.manifest = digest, size, msgspec.to_builtins(manifest)
