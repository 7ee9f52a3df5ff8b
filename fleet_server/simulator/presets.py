"""Faults by name, for those who want no file. What each of them is stands in docs/simulator.md. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fleet_server.simulator.behaviours import Behaviours, BehavioursError, Fault, Link, Offline, check
from fleet_server.simulator.chances import Distribution

PRESETS = {
    "slow": Fault(share=1.0, slower=3.0),
    "slow-link": Fault(share=1.0, link=Link(bytes_s=50_000.0)),
    "flaky": Fault(share=1.0, cuts_per_hour=30.0, cut_s=10.0),
    "offline": Fault(share=1.0, offline=Offline(every_s=3600.0, for_s=900.0)),
    "lying-clock": Fault(share=1.0, clock_offset_s=Distribution(uniform=(-86_400.0, 86_400.0))),
    "reboots": Fault(share=1.0, reboots_per_day=24.0),
    "errors": Fault(share=1.0, error_rate=0.05),
}


def with_faults(behaviours: Behaviours, shares: Mapping[str, float]) -> Behaviours:
    """Behaviours with more faults, by their names.

    Raises:
        BehavioursError: for a name that there is not, or a share that is none.
    """
    unknown = sorted(set(shares) - set(PRESETS))
    if unknown:
        raise BehavioursError(f"faults: there is no {unknown[0]!r}; there are {', '.join(PRESETS)}")
    more = tuple(msgspec.structs.replace(PRESETS[name], name=name, share=share) for name, share in shares.items())
    return check(msgspec.structs.replace(behaviours, faults=behaviours.faults + more))
