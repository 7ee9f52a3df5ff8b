"""Python client: `Shoal` for notebooks, `Client` for every call of the REST API."""

from fleet_server.sdk.aio import AsyncDeployment, AsyncModel, AsyncShoal
from fleet_server.sdk.client import Client, segment
from fleet_server.sdk.deployment import Deployment
from fleet_server.sdk.errors import (
    ApiError,
    AuthError,
    BuildError,
    ChangedError,
    ConflictError,
    DeployError,
    ExportError,
    LocalError,
    NetError,
    NotFoundError,
    ShoalError,
    UnreachableError,
)
from fleet_server.sdk.exporting import ExportFormat
from fleet_server.sdk.model import Model
from fleet_server.sdk.shoal import Shoal

__all__ = [
    "ApiError",
    "AsyncDeployment",
    "AsyncModel",
    "AsyncShoal",
    "AuthError",
    "BuildError",
    "ChangedError",
    "Client",
    "ConflictError",
    "DeployError",
    "Deployment",
    "ExportError",
    "ExportFormat",
    "LocalError",
    "Model",
    "NetError",
    "NotFoundError",
    "Shoal",
    "ShoalError",
    "UnreachableError",
    "segment",
]
