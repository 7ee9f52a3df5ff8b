"""What would be done next in a fleet: in order, and by commands that exist."""

from __future__ import annotations

import shlex

import pytest

from fleet_server.overview.schemas import StepCode
from fleet_server.overview.steps import Standing, next_steps
from tests.contract.test_command_line import EVERY

NEW = Standing(devices=0, unmatched=0, enrolments=0, has_model=False, without_variant=None, ready=None)
DONE = Standing(devices=9, unmatched=0, enrolments=0, has_model=True, without_variant=None, ready=None)
EVERYTHING = Standing(devices=9, unmatched=2, enrolments=1, has_model=True, without_variant="m@2", ready="m@1")


@pytest.mark.parametrize(
    ("standing", "codes"),
    [
        (NEW, [StepCode.NO_DEVICE, StepCode.NO_MODEL]),
        (DONE, []),
        (
            EVERYTHING,
            [StepCode.ENROLMENTS_WAIT, StepCode.UNMATCHED_DEVICES, StepCode.NO_VARIANT, StepCode.READY_WITHOUT_ROLLOUT],
        ),
    ],
)
def test_what_lacks_is_named_in_the_order_in_which_it_is_done(standing: Standing, codes: list[StepCode]) -> None:
    assert [one.code for one in next_steps(standing)] == codes


def test_a_device_that_waits_is_no_lack_of_devices() -> None:
    waits = Standing(devices=0, unmatched=0, enrolments=3, has_model=True, without_variant=None, ready=None)
    (step,) = next_steps(waits)
    assert step.text.startswith("3 devices wait for approval")


@pytest.mark.parametrize("standing", [NEW, EVERYTHING])
def test_commands_exist_with_the_options_they_name(standing: Standing) -> None:
    for step in next_steps(standing):
        words = shlex.split(step.command)
        assert words.pop(0) == "shoal"
        path: tuple[str, ...] = ()
        while words and (*path, words[0]) in EVERY:
            path = (*path, words.pop(0))
        assert len(path) >= 2, step.command
        known = {name for parameter in EVERY[path].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, step.command
