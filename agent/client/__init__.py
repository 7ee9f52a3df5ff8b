"""What a program on a device asks the device's models with: `Client`, and `AsyncClient` for asyncio."""

from agent.client.client import AsyncClient, Client
from agent.client.core import FeedbackResult
from agent.client.encoding import Answer
from agent.client.errors import (
    BadRequestError,
    BusyError,
    InferenceError,
    ModelFailedError,
    NotReadyError,
    TimedOutError,
    UnknownModelError,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "BadRequestError",
    "BusyError",
    "Client",
    "FeedbackResult",
    "InferenceError",
    "ModelFailedError",
    "NotReadyError",
    "TimedOutError",
    "UnknownModelError",
]
