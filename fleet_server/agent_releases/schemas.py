"""HTTP shapes of releases of the agent."""

from __future__ import annotations

import datetime as dt

from pydantic import Field

from fleet_server.schemas import Digest, Request, Response, example


class AgentReleaseCreate(Request):
    """A bundle of a release, uploaded before."""

    model_config = example(digest="5d41402abc4b2a76b9719d911017c592ae8b8b4f3b8a7a7e3f8a3f8f3a1d2c4b")

    digest: Digest = Field(description="Of the upload: a file that `make agent-release` made.")


class AgentBundleView(Response):
    """What one platform gets of a release."""

    platform: str = Field(examples=["linux-x86_64-glibc-cp311"])
    digest: str
    size: int
    unpacked: int = Field(description="Bytes that it takes on a device's disk.")
    launcher: int = Field(description="The oldest launcher that can start it.")
    after: str = Field(description="The oldest version of the agent that it may follow; empty for any.")
    signed: bool = Field(description="Whether devices would take it: else it waits for a signature.")


class AgentReleaseView(Response):
    """A release of the agent."""

    observed = frozenset({"devices"})

    version: str
    reference: str = Field(description="What a rollout names.", examples=["shoal-agent@0.2.0"])
    bundles: list[AgentBundleView] = Field(description="By platform.")
    devices: int = Field(description="Devices that say they run it.")
    created_at: dt.datetime
