"""The phases of a deployment, as the device goes through them: one table, one check.

    pending → downloading → verifying → loading → [exposed →] probation → active
                   └────────────┴──────────┴──────────┴──────────┴→ failed | rolled_back | superseded

`exposed` means the new version runs beside the one that serves, for as long as the server wants it to: it is given
copies of requests, or answers a share of them. `failed` means the new version never served; `rolled_back` means it
served, or was exposed, did badly and the device went back by itself to what it ran before; `superseded` means a newer
desired state replaced it. One whose watching a restart interrupted begins anew, and has served: it ends as
`rolled_back` wherever it fails.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a deployment is on its device."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    LOADING = "loading"
    EXPOSED = "exposed"
    PROBATION = "probation"
    ACTIVE = "active"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"


_ENDS_EARLY = frozenset({Phase.FAILED, Phase.ROLLED_BACK, Phase.SUPERSEDED})

# A restart sends a deployment back to an earlier phase: starting again is the only recovery path.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.PENDING: frozenset({Phase.DOWNLOADING, Phase.VERIFYING, Phase.LOADING}) | _ENDS_EARLY,
    Phase.DOWNLOADING: frozenset({Phase.VERIFYING, Phase.PENDING}) | _ENDS_EARLY,
    Phase.VERIFYING: frozenset({Phase.LOADING, Phase.DOWNLOADING, Phase.PENDING}) | _ENDS_EARLY,
    Phase.LOADING: frozenset({Phase.EXPOSED, Phase.PROBATION, Phase.DOWNLOADING, Phase.PENDING}) | _ENDS_EARLY,
    Phase.EXPOSED: frozenset({Phase.PROBATION, Phase.PENDING}) | _ENDS_EARLY,
    Phase.PROBATION: frozenset({Phase.ACTIVE, Phase.PENDING}) | _ENDS_EARLY,
    # An active artifact that was damaged on disk is fetched again.
    Phase.ACTIVE: frozenset({Phase.SUPERSEDED, Phase.ROLLED_BACK, Phase.PENDING}),
    Phase.FAILED: frozenset(),
    Phase.ROLLED_BACK: frozenset(),
    Phase.SUPERSEDED: frozenset(),
}

ENDED = frozenset(phase for phase, following in TRANSITIONS.items() if not following)
SETTLED = ENDED | {Phase.ACTIVE}


class TransitionError(Exception):
    """A deployment was asked to go where the table does not lead; names both phases."""

    def __init__(self, current: Phase, wanted: Phase) -> None:
        super().__init__(f"a deployment can't go from {current.value!r} to {wanted.value!r}")
        self.current = current
        self.wanted = wanted


def check_transition(current: Phase, wanted: Phase) -> Phase:
    """Return `wanted` when the table leads there from `current` (or it is the same phase).

    Raises:
        TransitionError: otherwise.
    """
    if wanted is not current and wanted not in TRANSITIONS[current]:
        raise TransitionError(current, wanted)
    return wanted
