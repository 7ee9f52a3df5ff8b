"""The states of a command: the table, and what a device's word makes of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.commands import CommandPhase
from fleet_server.domain.commands import (
    ENDED,
    OPEN,
    TRANSITIONS,
    CommandState,
    CommandTransitionError,
    after_answer,
    check_transition,
)


def test_the_table_has_every_state_and_every_end_is_one() -> None:
    assert set(TRANSITIONS) == set(CommandState)
    assert {CommandState.QUEUED, CommandState.SENT, CommandState.RUNNING} == OPEN
    assert all(TRANSITIONS[state] == frozenset() for state in ENDED)
    assert all(TRANSITIONS[state] >= {CommandState.TIMED_OUT, CommandState.CANCELLED} for state in OPEN)
    with pytest.raises(CommandTransitionError, match="'succeeded' to 'running'"):
        check_transition(CommandState.SUCCEEDED, CommandState.RUNNING)


@given(st.sampled_from(CommandState), st.lists(st.sampled_from(CommandPhase), max_size=6))
def test_whatever_a_device_says_the_first_end_stays(state: CommandState, said: list[CommandPhase]) -> None:
    ended: CommandState | None = state if state in ENDED else None
    for phase in said:
        state = after_answer(state, phase)
        assert ended is None or state is ended
        ended = state if state in ENDED else None
        assert (state in ENDED) or phase is CommandPhase.RUNNING


def test_what_was_begun_can_not_be_refused_any_more() -> None:
    assert after_answer(CommandState.SENT, CommandPhase.REFUSED) is CommandState.REFUSED
    assert after_answer(CommandState.RUNNING, CommandPhase.REFUSED) is CommandState.FAILED
    assert after_answer(CommandState.QUEUED, CommandPhase.RUNNING) is CommandState.RUNNING
