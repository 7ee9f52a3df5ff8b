"""Which devices are told again what they are to run, and when. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_S = 60.0
LONGEST_S = 900.0
AT_ONCE = 500  # told at one look: who is behind because the server is must not make it worse


@dataclass
class _Behind:
    revision: int
    since: float
    wait_s: float = FIRST_S


class Behind:
    """Devices that are behind what they were told, and when each is to be told again: after a time that doubles."""

    def __init__(self) -> None:
        self._devices: dict[str, _Behind] = {}

    def due(self, behind: Mapping[str, int], now: float) -> list[str]:
        """The devices to be told again, who has waited longest first; they count as told.

        Args:
            behind: the desired revision of every device that has not said that it has it.
            now: seconds, of a clock that is never set.
        """
        self._devices = {
            device: known
            if (known := self._devices.get(device)) is not None and known.revision == revision
            else _Behind(revision, now)
            for device, revision in behind.items()
        }
        late = [(one.since + one.wait_s, device) for device, one in self._devices.items()]
        found = [device for at, device in sorted(late) if at <= now][:AT_ONCE]
        for device in found:
            one = self._devices[device]
            one.since, one.wait_s = now, min(2 * one.wait_s, LONGEST_S)
        return found
