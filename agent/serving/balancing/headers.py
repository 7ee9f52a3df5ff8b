"""What devices say to each other beside a request that is forwarded, and its answer: headers of HTTP. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from agent.protocol.topics import DIGEST
from agent.serving.balancing.book import Load

ARTIFACT = "Shoal-Artifact"  # digest of the one that is to answer; any of the version where it is absent
TIMEOUT_MS = "Shoal-Timeout-Ms"  # how long it may still wait for its turn
QUEUE_MS = "Shoal-Queue-Ms"  # of an answer: how long what waits for the model will take
INFER_MS = "Shoal-Infer-Ms"  # of an answer: how long one inference takes
ANSWERED_BY = "Shoal-Answered-By"  # of an answer to a client: the peer that gave it
LONGEST_MS = 86_400_000.0


def artifact_of(headers: Mapping[str, str]) -> str | None:
    """The digest of the artifact that is to answer; None for any of the version.

    Raises:
        ValueError: when it is none.
    """
    digest = headers.get(ARTIFACT.lower())
    if digest is not None and not DIGEST.match(digest):
        raise ValueError(f"{ARTIFACT} is no digest")
    return digest


def timeout_s_of(headers: Mapping[str, str]) -> float:
    """How long a request may still wait for its turn, in seconds; 0 for as long as it takes.

    Raises:
        ValueError: when it is no number.
    """
    text = headers.get(TIMEOUT_MS.lower())
    if text is None:
        return 0.0
    milliseconds = _number(text)
    if milliseconds is None:
        raise ValueError(f"{TIMEOUT_MS} is no number of milliseconds")
    return max(0.001, milliseconds / 1000)


def load_headers(load: Load) -> dict[str, str]:
    """How busy this device is, said with an answer: roughly, so that many answers begin alike, and are made once."""
    return {QUEUE_MS: f"{load.queue_s * 1000:.2g}", INFER_MS: f"{load.infer_s * 1000:.2g}"}


def load_of(headers: Mapping[str, str]) -> Load | None:
    """How busy a peer says it is; None where it does not, or what it says makes no sense."""
    queue, infer = (_number(headers.get(name.lower(), "")) for name in (QUEUE_MS, INFER_MS))
    return None if queue is None or infer is None else Load(queue / 1000, infer / 1000)


def _number(text: str) -> float | None:
    try:
        number = float(text[:32])
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 <= number <= LONGEST_MS else None
