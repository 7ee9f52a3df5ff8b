"""Who is connected, and who of them is about to ask."""

from __future__ import annotations

import pytest

from agent.serving import clients
from agent.serving.clients import FRESH_S, Clients


class One:
    """A connection."""

    def leave(self) -> None:
        """End it."""


def test_who_has_just_come_is_about_to_ask_until_he_does_or_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    all_of_them, first, second = Clients(), One(), One()
    assert not all_of_them.about_to_ask
    assert all_of_them.come(first)
    assert all_of_them.about_to_ask
    all_of_them.busy(first)
    assert (all_of_them.about_to_ask, all_of_them.asking) == (False, 1)
    all_of_them.idle(first)  # answered: it has come long ago
    assert (all_of_them.about_to_ask, all_of_them.asking) == (False, 0)
    assert all_of_them.come(second)
    now[0] += FRESH_S / 2
    assert all_of_them.about_to_ask
    now[0] += FRESH_S
    assert not all_of_them.about_to_ask
    assert all_of_them.come(One())
    all_of_them.go(second)
    assert all_of_them.about_to_ask
