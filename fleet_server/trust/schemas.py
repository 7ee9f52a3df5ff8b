"""HTTP shapes of the TUF repository. Metadata travels as text: the very bytes that are, or are to be, signed."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import Field

from fleet_server.schemas import Request, Response, example

BODY_CHARS = 5_000_000


class RoleView(Response):
    """A role as it is published."""

    role: str = Field(examples=["targets"])
    version: int
    keys: list[str] = Field(description="Ids of the keys that may sign it.")
    threshold: int = Field(description="How many of them must.")
    online: bool = Field(description="Whether this server holds enough of them to sign by itself.")
    expires_at: dt.datetime


class WaitingManifest(Response):
    """A manifest that is to be signed, or whose signature is to go."""

    path: str = Field(description="Its TUF target path.")
    change: Literal["add", "replace", "remove"]
    manifest: str | None = Field(description="Its JSON, exactly as it is signed; null for one that goes.")


class ProposalView(Response):
    """Metadata that waits for signatures."""

    role: str
    keys: list[str] = Field(description="Ids of the keys that may sign it.")
    threshold: int
    signed_by: list[str]
    body: str = Field(description="The metadata, with the signatures that came.")
    manifests: list[WaitingManifest]


class TrustView(Response):
    """The fleet's repository."""

    roles: list[RoleView]
    waiting: list[ProposalView]


class SignatureUpload(Request):
    """Signed metadata: a proposal with more signatures, or the next root."""

    model_config = example(role="timestamp", body="{}")

    role: str = Field(max_length=200, examples=["model.mnist"])
    body: str = Field(max_length=BODY_CHARS)


class SignatureView(Response):
    """What came of a signature."""

    role: str
    published: bool = Field(description="Whether it has enough signatures, and is what devices get.")


class KeyCreate(Request):
    """A new key that the server is to make for a role."""

    model_config = example(role="timestamp")

    role: Literal["root", "targets", "snapshot", "timestamp"]


class KeyView(Response):
    """A public key as TUF writes it."""

    id: str
    key: dict[str, object]
