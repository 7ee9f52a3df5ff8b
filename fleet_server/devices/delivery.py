"""The delivery policy of profiles and rollouts: how people write it, and what devices are told."""

from __future__ import annotations

import zoneinfo
from typing import Any

from pydantic import Field, field_validator

from agent.protocol.delivery import DeliveryPolicy, read_budgets, read_rate, read_window
from agent.protocol.limits import LIMITS
from fleet_server.schemas import Request, example


class Delivery(Request):
    """How artifacts may come to devices, and when they may begin to serve. What is not given is not bounded."""

    model_config = example(
        rate="2 MB/s",
        budgets={"cellular": "50 MB per day", "metered": "1 GB per month"},
        download=["Mon-Fri 22:00-04:00 Europe/Berlin", "Sat,Sun 00:00-24:00 Europe/Berlin"],
        activate=["02:00-04:00"],
    )

    rate: str | None = Field(None, max_length=40, description="At most so much a second to each device: `2 MB/s`.")
    budgets: dict[str, str] = Field(
        default_factory=dict,
        max_length=8,
        description="By kind of link (`ethernet`, `wifi`, `cellular`, or `metered` for all that cost by the byte), "
        "such as `50 MB per day`; per hour, day, week or month of the device's own time. The stricter of this and "
        "what the device's configuration says holds.",
    )
    download: list[str] = Field(
        default_factory=list,
        max_length=LIMITS.windows,
        description="When artifacts may be downloaded, such as `Mon-Fri 22:00-04:00 Europe/Berlin`; without days on "
        "each, without a zone in the device's own. Empty: always.",
    )
    activate: list[str] = Field(
        default_factory=list,
        max_length=LIMITS.windows,
        description="When a version that was downloaded may begin to serve, written alike. Empty: always.",
    )

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, value: str | None) -> str | None:
        if value is not None:
            read_rate(value)
        return value

    @field_validator("budgets")
    @classmethod
    def _are_budgets(cls, value: dict[str, str]) -> dict[str, str]:
        read_budgets(value)
        return value

    @field_validator("download", "activate")
    @classmethod
    def _are_windows(cls, value: list[str]) -> list[str]:
        for text in value:
            zone = read_window(text).zone
            if zone and zone not in zoneinfo.available_timezones():
                raise ValueError(f"there is no time zone {zone!r}: names are like Europe/Berlin or UTC")
        return value

    def policy(self) -> DeliveryPolicy:
        """What devices are told."""
        return DeliveryPolicy(
            rate=read_rate(self.rate) if self.rate else 0,
            budgets=read_budgets(self.budgets),
            download=tuple(map(read_window, self.download)),
            activate=tuple(map(read_window, self.activate)),
        )


def policy_of(stored: dict[str, Any] | None) -> DeliveryPolicy:
    """The policy that a row holds."""
    return Delivery.model_validate(stored).policy() if stored else DeliveryPolicy()


def combined(general: DeliveryPolicy, special: DeliveryPolicy) -> DeliveryPolicy:
    """A profile's policy and a rollout's: the lower rate and all budgets hold; windows are the rollout's, if any."""
    rates = [one.rate for one in (general, special) if one.rate]
    names = general.budgets.keys() | special.budgets.keys()
    return DeliveryPolicy(
        rate=min(rates, default=0),
        budgets={name: general.budgets.get(name, ()) + special.budgets.get(name, ()) for name in sorted(names)},
        download=special.download or general.download,
        activate=special.activate or general.activate,
    )


def without_windows(policy: DeliveryPolicy) -> DeliveryPolicy:
    """What holds for a device that is taken back: that does not wait for a better hour."""
    return DeliveryPolicy(rate=policy.rate, budgets=policy.budgets)
