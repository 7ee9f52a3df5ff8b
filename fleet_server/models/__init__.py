"""The tables (ORM only, no rules). Every table carries its fleet, or names a row that does: fleets can be tenants."""

from fleet_server.models.access import AccessToken, AuditEvent, AuditHead, Fleet, Grant, User
from fleet_server.models.alerts import (
    Alert,
    AlertGroup,
    AlertMail,
    AlertRoute,
    AlertRule,
    AlertSilence,
    DriftReference,
    ModelDrift,
)
from fleet_server.models.catalog import Blob, CandidateArtifact, Model, SourceForm, Variant, Version
from fleet_server.models.commands import CommandLogLine, DeviceCommand
from fleet_server.models.conversions import ConversionJob
from fleet_server.models.deltas import ArtifactEncoding, DeviceHolding
from fleet_server.models.devices import Device, DeviceAttribute, Profile
from fleet_server.models.enrolment import (
    DeviceCertificate,
    DeviceConduct,
    DeviceIdentity,
    Enrolment,
    EnrolmentToken,
)
from fleet_server.models.gates import GateRun, GateTrial
from fleet_server.models.operations import (
    DeviceShard,
    IdempotencyKey,
    Lease,
    OutboxMessage,
    SchemaFloor,
    Server,
)
from fleet_server.models.overview import FleetSnapshot
from fleet_server.models.rollouts import Deployment, Rollout
from fleet_server.models.samples import SamplePieceRow, SampleRequestRow, SampleUpload, SamplingRule
from fleet_server.models.shards import ShardPlan
from fleet_server.models.telemetry import (
    HostWindowRow,
    ModelWindowRow,
    TelemetryBatchRow,
    TelemetryFleetTotal,
    TelemetryGroup,
    TelemetryRollup,
    TelemetrySeries,
    TelemetrySpool,
)
from fleet_server.models.trust import TrustMetadata, TrustProposal, TrustTarget
from fleet_server.models.webhooks import Webhook, WebhookDelivery

__all__ = [
    "AccessToken",
    "Alert",
    "AlertGroup",
    "AlertMail",
    "AlertRoute",
    "AlertRule",
    "AlertSilence",
    "ArtifactEncoding",
    "AuditEvent",
    "AuditHead",
    "Blob",
    "CandidateArtifact",
    "CommandLogLine",
    "ConversionJob",
    "Deployment",
    "Device",
    "DeviceAttribute",
    "DeviceCertificate",
    "DeviceCommand",
    "DeviceConduct",
    "DeviceHolding",
    "DeviceIdentity",
    "DeviceShard",
    "DriftReference",
    "Enrolment",
    "EnrolmentToken",
    "Fleet",
    "FleetSnapshot",
    "GateRun",
    "GateTrial",
    "Grant",
    "HostWindowRow",
    "IdempotencyKey",
    "Lease",
    "Model",
    "ModelDrift",
    "ModelWindowRow",
    "OutboxMessage",
    "Profile",
    "Rollout",
    "SamplePieceRow",
    "SampleRequestRow",
    "SampleUpload",
    "SamplingRule",
    "SchemaFloor",
    "Server",
    "ShardPlan",
    "SourceForm",
    "TelemetryBatchRow",
    "TelemetryFleetTotal",
    "TelemetryGroup",
    "TelemetryRollup",
    "TelemetrySeries",
    "TelemetrySpool",
    "TrustMetadata",
    "TrustProposal",
    "TrustTarget",
    "User",
    "Variant",
    "Version",
    "Webhook",
    "WebhookDelivery",
]
