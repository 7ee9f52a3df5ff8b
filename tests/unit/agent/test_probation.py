"""A version that serves badly is found out before its time is over; one that does well is let go."""

from __future__ import annotations

from agent.protocol.messages import ModelWindow
from agent.update.probation import Over, Probation


def window(deployment_id: str, requests: int, errors: int) -> ModelWindow:
    return ModelWindow("m", "1", "a" * 64, deployment_id, "cpu", requests=requests, errors=errors)


def test_it_is_over_when_the_time_is() -> None:
    watch = Probation()
    watch.begin("d", 5.0, 10.0)
    watch.window(window("d", 100, 1))
    watch.window(window("other", 100, 100))
    assert watch.tick(14.9) == []
    assert watch.active
    assert watch.tick(15.0) == [Over("d", None)]
    assert not watch.active


def test_errors_end_it_at_once() -> None:
    watch = Probation()
    watch.begin("d", 3600.0, 0.0)
    watch.window(window("d", 4, 4))
    assert watch.tick(1.0) == []
    watch.window(window("d", 1, 1))
    (over,) = watch.tick(2.0)
    assert over.problem == "5 of 5 requests failed while the version was watched"


def test_a_dead_worker_ends_all_watching() -> None:
    watch = Probation()
    watch.begin("d", 1.0, 0.0)
    watch.clear()
    assert watch.tick(5.0) == []
