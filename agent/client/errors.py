"""Why an inference has no answer."""

from __future__ import annotations


class InferenceError(Exception):
    """Base of all of them; the message says what the API said."""


class BadRequestError(InferenceError):
    """The request does not fit the model; the message names the field. The same again is refused again."""


class UnknownModelError(InferenceError):
    """The device serves no such model, or not in that version."""


class NotReadyError(InferenceError):
    """The model is not loaded at the moment, or the agent does not answer, and that lasted as long as was waited."""


class BusyError(InferenceError):
    """More requests wait than the device takes, and that lasted as long as was waited."""


class TimedOutError(InferenceError):
    """The answer did not come in time."""


class ModelFailedError(InferenceError):
    """The model itself failed on this input."""
