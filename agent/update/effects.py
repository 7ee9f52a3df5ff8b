"""What is to be done when the updater has decided; done by `agent.deployments` and `agent.inference`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckTrust:
    """Find out whether a deployment's manifest was signed, before anything of it is fetched."""

    deployment_id: str


@dataclass(frozen=True)
class Download:
    """Fetch what is missing of a deployment's artifact."""

    deployment_id: str


@dataclass(frozen=True)
class StopDownload:
    """Fetch a deployment's artifact no more."""

    deployment_id: str


@dataclass(frozen=True)
class Verify:
    """Check the digest of an artifact that is in the store."""

    deployment_id: str


@dataclass(frozen=True)
class LoadArtifact:
    """Let the worker load an artifact beside what it serves."""

    deployment_id: str


@dataclass(frozen=True)
class ActivateArtifact:
    """Let the worker answer with a loaded artifact."""

    deployment_id: str


@dataclass(frozen=True)
class UnloadArtifact:
    """Let the worker forget an artifact."""

    model: str
    digest: str


@dataclass(frozen=True)
class BeginProbation:
    """Watch a deployment, beside the one that served before."""

    deployment_id: str
    before_id: str | None


@dataclass(frozen=True)
class ExposeArtifact:
    """Let a loaded artifact run beside the deployment that serves, and watch it."""

    deployment_id: str
    before_id: str


@dataclass(frozen=True)
class LetServe:
    """Let a deployment that runs beside another serve in full, as soon as it may."""

    deployment_id: str


Effect = (
    CheckTrust
    | Download
    | StopDownload
    | Verify
    | LoadArtifact
    | ActivateArtifact
    | UnloadArtifact
    | BeginProbation
    | ExposeArtifact
    | LetServe
)
