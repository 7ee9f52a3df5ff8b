"""The agent's own errors; what the server and the journal see is `agent.protocol.errors`."""

from __future__ import annotations


class AgentError(Exception):
    """Base of errors the agent raises on purpose; the message ends in the remedy."""


class ConfigError(AgentError):
    """A configuration key is missing, unknown or not usable; the message names it."""


class IdentityError(AgentError):
    """The device's key or certificate can't be used, or the server is not who it should be."""


class EnrolmentError(AgentError):
    """The device got no certificate; the message says why and what to do."""
