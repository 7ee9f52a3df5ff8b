"""What devices report, many at a time: the database is asked and told once for all of them.

A fleet that comes back says a thousand reports at once; each taken in by itself asks the database some ten times.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from agent.protocol.messages import Reported
from fleet_server.clock import utc_now
from fleet_server.db import UNAVAILABLE, Database, savepoint
from fleet_server.devices import reports as device_reports
from fleet_server.enrolment import service as enrolment
from fleet_server.gates import service as gates
from fleet_server.models import Device
from fleet_server.rollouts import desired, reports
from fleet_server.samples import reports as sample_reports
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
Said = tuple[str, Reported]  # a device, and what it says


class Reports:
    """Takes in reports.

    Args:
        database: where they go.
        settings: what devices are told because of them.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def take(self, said: Sequence[Said]) -> None:
        """Take in what devices said, in this order, in one transaction; what fails of one device is undone alone."""
        with self._database.write() as session:
            out = enrolment.locked_out(session, sorted({device_id for device_id, _ in said}))
            for group in _once_each([one for one in said if one[0] not in out]):
                self._take_together(session, group)

    def _take_together(self, session: Session, group: Sequence[Said]) -> None:
        """Take in one report of each of some devices; where they fail together, each alone."""
        error = self._failure(session, group)
        if error is None:
            return
        if len(group) > 1:
            for one in group:
                self._take_together(session, [one])
            return
        if isinstance(error, IntegrityError):  # another server has just registered it: now it is there
            error = self._failure(session, group)
        if error is not None:
            device_id = group[0][0]
            extra = {"device": device_id}
            log.error("a report of device %s could not be taken in", device_id, exc_info=error, extra=extra)

    def _failure(self, session: Session, group: Sequence[Said]) -> Exception | None:
        """Why reports could not be taken in, which leaves nothing of them; None when they are."""
        try:
            with savepoint(session):
                self._apply(session, dict(group))
        except UNAVAILABLE:
            raise
        except Exception as error:  # noqa: BLE001  one report must not keep others out
            return error
        return None

    def _apply(self, session: Session, said: dict[str, Reported]) -> None:
        now = utc_now()
        outcomes = device_reports.record_reports(session, said, now)
        taken = [(one.device, said[device_id]) for device_id, one in outcomes.items() if one.accepted]
        reports.apply_reports(session, self._settings, taken, now)
        new = gates.apply_reports(session, taken, now) | sample_reports.apply_reports(session, taken, now)
        for fleet_id in sorted({device.fleet_id for device, _ in taken}):
            of_fleet = [one for one in taken if one[0].fleet_id == fleet_id]
            self._answer(session, of_fleet, new, {device.id: outcomes[device.id].lans for device, _ in of_fleet})

    def _answer(
        self,
        session: Session,
        taken: Sequence[tuple[Device, Reported]],
        new: set[str],
        lans: Mapping[str, frozenset[str]],
    ) -> None:
        """Tell devices of one fleet what is new to them, and again what they have not heard.

        Args:
            session: to write with.
            taken: whose reports were taken in.
            new: ids of those that are to be told something new.
            lans: by id, those that a device came to or left, or where it has another address now.
        """
        to_tell = {device.id: device for device, _ in taken if device.id in new or lans[device.id]}
        again = []
        for device, reported in taken:
            if reported.revision > device.desired_revision:
                # The server's database is older than what the device has seen: go past it, or it would not listen.
                device.desired_revision = reported.revision
                to_tell[device.id] = device
            elif reported.revision < device.desired_revision:
                again.append(device)
        neighbours = desired.neighbours(
            session, taken[0][0].fleet_id, {lan for found in lans.values() for lan in found}
        )
        to_tell |= {one.id: one for one in neighbours}
        desired.queue_all(session, self._settings, [to_tell[key] for key in sorted(to_tell)])
        desired.queue_all(session, self._settings, [one for one in again if one.id not in to_tell], resend=True)


def _once_each(said: Sequence[Said]) -> list[list[Said]]:
    """Groups in which each device is once, by device: so two transactions of many devices lock them in one order."""
    groups: dict[int, list[Said]] = defaultdict(list)
    times: dict[str, int] = defaultdict(int)
    for device_id, reported in said:
        groups[times[device_id]].append((device_id, reported))
        times[device_id] += 1
    return [sorted(groups[number], key=lambda one: one[0]) for number in sorted(groups)]
