"""HTTP shapes of enrolment."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fleet_server.schemas import Digest, Name, Request, Response, example

Pem = Annotated[str, Field(max_length=16_384, description="A signing request (PKCS #10) as PEM.")]
KEY = "SHA-256 of the public key (SubjectPublicKeyInfo), as `shoal-agent enroll` shows it."


class EnrolmentState(StrEnum):
    """Where a request for a certificate is."""

    PENDING = "pending"
    ISSUED = "issued"
    REJECTED = "rejected"


class EnrolmentCreate(Request):
    """A device asks for a certificate."""

    model_config = example(
        device_id="camera-01",
        csr="-----BEGIN CERTIFICATE REQUEST-----\n…\n-----END CERTIFICATE REQUEST-----\n",
        token="shoal1.…",  # noqa: S106 (an example)
    )

    device_id: Name
    csr: Pem
    token: str | None = Field(
        None, max_length=256, description="An enrolment token; without one somebody has to approve the request."
    )


class EnrolmentView(Response):
    """What became of a request, and, once it is issued, everything the device needs to connect."""

    id: str
    device_id: str
    fleet: str
    state: EnrolmentState
    key_sha256: str = Field(description=KEY)
    reason: str = Field(description="Why it waits or was rejected.")
    certificate: str | None = Field(None, description="The device's certificate and its chain, as PEM.")
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None
    ca: str = Field(description="What the broker's and this server's certificates are checked against, as PEM.")
    broker: str = Field(description="Where to connect, such as mqtts://fleet.example:8883.")
    trust_root: dict[str, Any] | None = Field(None, description="The TUF root that artifacts are checked by, if any.")
    retry_after_s: float = Field(2.0, description="Ask again after this time while it is pending.")


class EnrolmentSummary(Response):
    """A request as operators see it."""

    id: str
    device_id: str
    key_sha256: str = Field(description=KEY)
    state: EnrolmentState
    reason: str
    address: str = Field(description="Where it came from.")
    created_at: dt.datetime
    decided_at: dt.datetime | None
    decided_by: str | None


class TokenCreate(Request):
    """A new enrolment token."""

    model_config = example(uses=20, ttl_s=3600, tags={"site": "plant7"})

    uses: int = Field(1, ge=1, le=100_000, description="How many devices may enrol with it.")
    ttl_s: float = Field(3600.0, ge=10, le=30 * 86_400, description="How long it is valid, in seconds.")
    device_id: Name | None = Field(None, description="The only device that it is for.")
    tags: dict[Name, str] = Field(default_factory=dict, description="Tags for the devices that enrol with it.")


class TokenView(Response):
    """An enrolment token without its secret."""

    id: str
    uses_left: int
    expires_at: dt.datetime
    device_id: str | None
    tags: dict[str, str]
    created_at: dt.datetime
    created_by: str


class TokenCreated(TokenView):
    """A new token: the only time that its text is shown."""

    token: str = Field(description="For `shoal-agent enroll --token`; it also holds the CA's pin.")


class RegistrationCreate(Request):
    """A device that may enrol, known before it first connects."""

    model_config = example(device_id="camera-01", key_sha256="a" * 64, tags={"site": "plant7"})

    device_id: Name
    key_sha256: Digest | None = Field(
        None, description=KEY + " With it the device enrols by itself, and only that key."
    )
    tags: dict[Name, str] = Field(default_factory=dict, description="Tags that the device has from the start.")


class CertificateView(Response):
    """A certificate of a device."""

    serial: str
    key_sha256: str
    not_before: dt.datetime
    not_after: dt.datetime
    revoked_at: dt.datetime | None


class ConductView(Response):
    """How often a device was out of order."""

    malformed: int = Field(description="Messages that could not be read.")
    flooded: int = Field(description="Messages beyond its share, which were dropped.")
    last_at: dt.datetime
    last_detail: str


class IdentitySummary(Response):
    """A device that has an identity."""

    device_id: str
    fleet: str
    created_at: dt.datetime
    created_by: str
    revoked_at: dt.datetime | None


class IdentityView(Response):
    """A device's identity: who registered it, its certificates, and whether it is locked out."""

    observed = frozenset({"conduct"})

    device_id: str
    registered: bool = Field(description="Whether it has an identity; a device of an open broker has none.")
    key_sha256: str | None = Field(None, description="The only key that it may first enrol with.")
    created_at: dt.datetime | None = None
    created_by: str | None = None
    revoked_at: dt.datetime | None = None
    evicted_at: dt.datetime | None = Field(None, description="When its connection was ended after that.")
    certificates: list[CertificateView] = Field(default_factory=list, description="The newest ten.")
    conduct: ConductView | None = Field(None, description="Null for a device that was never out of order.")


class AuthorityView(Response):
    """The fleet's CA."""

    certificate: str = Field(description="PEM: the issuing certificate, then those above it.")
    pin: str = Field(description="SHA-256 of the issuing certificate's public key.")


class ServerCertificateCreate(Request):
    """A broker, or a program that listens to alerts, asks for a certificate."""

    model_config = example(
        csr="-----BEGIN CERTIFICATE REQUEST-----\n…\n-----END CERTIFICATE REQUEST-----\n", names=["broker.example"]
    )

    csr: Pem
    names: list[Annotated[str, Field(min_length=1, max_length=253)]] = Field(
        default_factory=list, max_length=32, description="Host names and addresses that devices reach the broker by."
    )
    purpose: Literal["broker", "alerts"] = Field(
        "broker", description="`alerts`: for a client that may listen to `shoal/v1/alerts/+` and do nothing else."
    )

    @model_validator(mode="after")
    def _has_names_where_it_needs_them(self) -> Self:
        if (self.purpose == "broker") != bool(self.names):
            raise ValueError("names: a broker has at least one, and who listens to alerts has none")
        return self


class ServerCertificateView(Response):
    """A certificate of a broker, or of who listens to alerts, and what others are checked by."""

    certificate: str
    ca: str
    crl: str = Field(description="Revoked certificates; renewed below `/api/v1/crl`.")
    not_after: dt.datetime
