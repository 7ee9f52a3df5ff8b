"""Whether, and when, something is asked again. Pure but for the clock."""

from __future__ import annotations

import time

from agent.client.connection import CutOffError
from agent.client.errors import (
    BadRequestError,
    BusyError,
    InferenceError,
    ModelFailedError,
    NotReadyError,
    TimedOutError,
    UnknownModelError,
)
from agent.client.http1 import Reply, ReplyError

AGAIN_S = 0.05  # before it is asked again, where the API does not say
AGAIN_MOST_S = 1.0
CUT_OFF_MOST = 3  # connections that end under one request, before it is taken to be the reason


class Again:
    """Of one call.

    Args:
        until: when it is given up, by `time.monotonic`.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self._pause_s = AGAIN_S
        self._cut_off = 0
        self._trouble = ""

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            TimedOutError: none.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimedOutError(self._trouble or "the time for it was over before it was asked")
        return left

    def after_failure(self, error: OSError) -> float:
        """How long to wait when nobody answered, in seconds.

        Raises:
            TimedOutError: when it took too long.
            ModelFailedError: when what came can't be read, or the worker ended again and again while it had this
                request: it may be why.
            NotReadyError: when there is no time left.
        """
        if isinstance(error, TimeoutError):
            raise TimedOutError("the answer did not come in time") from None
        if isinstance(error, ReplyError):
            raise ModelFailedError(f"the inference API gave an answer that can't be read: {error}") from None
        self._trouble = f"the inference API does not answer: {str(error) or type(error).__name__}"
        self._cut_off += isinstance(error, CutOffError)
        if self._cut_off >= CUT_OFF_MOST:
            said = f"the connection ended {CUT_OFF_MOST} times while this request was under way"
            raise ModelFailedError(said) from None
        return self._pause(0.0, NotReadyError(self._trouble))

    def after(self, reply: Reply) -> float:
        """How long to wait when it was refused, in seconds.

        Raises:
            InferenceError: the one that says why, where it is refused for good, or there is no time left.
        """
        if reply.status not in {429, 503}:
            raise _error(reply) from None
        kind = BusyError if reply.status == 429 else NotReadyError
        return self._pause(reply.again_after_s, kind(reply.said))

    def _pause(self, least_s: float, otherwise: InferenceError) -> float:
        pause = max(self._pause_s, least_s)
        self._pause_s = min(2 * self._pause_s, AGAIN_MOST_S)
        if time.monotonic() + pause >= self.until:
            raise otherwise from None
        return pause


def _error(reply: Reply) -> InferenceError:
    kinds: dict[int, type[InferenceError]] = {404: UnknownModelError, 500: ModelFailedError, 504: TimedOutError}
    kind = kinds.get(reply.status)
    return BadRequestError(reply.said, reply.field) if kind is None else kind(reply.said)
