"""What would be done next in a fleet, each with the command that does it: pure."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_server.overview.schemas import NextStep, StepCode


@dataclass(frozen=True)
class Standing:
    """What decides about next steps.

    Attributes:
        devices: how many there are.
        unmatched: those of them that match no profile.
        enrolments: how many devices wait for approval.
        has_model: whether a version was pushed.
        without_variant: the newest version, as `model@version`, where nothing was built of it.
        ready: the newest version that is ready, as `model@version`, where it was never rolled out.
    """

    devices: int
    unmatched: int
    enrolments: int
    has_model: bool
    without_variant: str | None
    ready: str | None


def next_steps(now: Standing) -> list[NextStep]:
    """What would be done next, in the order in which it would be done."""
    found: list[NextStep] = []

    def add(code: StepCode, text: str, command: str) -> None:
        found.append(NextStep(code=code, text=text, command=command))

    if now.enrolments:
        text = f"{_devices(now.enrolments, 'waits', 'wait')} for approval: compare its key before you approve it."
        add(StepCode.ENROLMENTS_WAIT, text, "shoal device pending")
    elif not now.devices:
        text = "No device is enrolled yet: make a token, and let an agent enrol with it."
        add(StepCode.NO_DEVICE, text, "shoal device token create")
    if now.unmatched:
        text = (
            f"{_devices(now.unmatched, 'matches', 'match')} no profile, and no rollout reaches such: create a profile "
            "of that kind of device."
        )
        add(StepCode.UNMATCHED_DEVICES, text, "shoal profile create --shipped NAME")
    if not now.has_model:
        text = "There is no model yet: push a version of one, with rows to calibrate and to judge it by."
        add(StepCode.NO_MODEL, text, "shoal model push MODEL@VERSION model.onnx --calibration c.npz --evaluation e.npz")
    if now.without_variant is not None:
        text = f"Nothing was built of {now.without_variant}: build its variants for the profiles of your devices."
        add(StepCode.NO_VARIANT, text, f"shoal variant build {now.without_variant} --profile PROFILE")
    if now.ready is not None:
        text = f"{now.ready} is ready and was never rolled out: begin with a tenth of the devices."
        add(
            StepCode.READY_WITHOUT_ROLLOUT,
            text,
            f'shoal rollout create {now.ready} --all --stages "10%:10m,100%" --watch',
        )
    return found


def _devices(count: int, one: str, many: str) -> str:
    return f"1 device {one}" if count == 1 else f"{count} devices {many}"
