"""Why an inference has no answer."""

from __future__ import annotations

from collections.abc import Sequence


class InferenceError(Exception):
    """Base of all of them; the message says what the API said."""


class BadRequestError(InferenceError):
    """The request does not fit the model; the message names the field. The same again is refused again.

    Attributes:
        field: the way to the field at fault in the request, tensors by their names, such as `("inputs", "x", "shape")`;
            empty where it is no field, or the API names none.
    """

    def __init__(self, message: str, field: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.field = tuple(field)


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
