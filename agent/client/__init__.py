"""What a program on a device asks the device's models with: `Client`, and `AsyncClient` for asyncio.

Names are imported when they are used: the agent's supervisor uses the connection alone, and loads no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_ELSEWHERE = {"AsyncClient": "client", "Client": "client", "FeedbackResult": "core", "Answer": "encoding"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"agent.client.{_ELSEWHERE.get(name, 'errors')}"), name)
