"""What devices say they lack, many at a time: who may have it is asked of the database once for all of them.

Devices that wait say again what they lack, so the more of them wait the more comes of this; were each asked for by
itself, a thousand that begin at once would say more than is heard, and be served what they lacked minutes ago.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from agent.protocol.manifest import Content, chunk_count
from agent.protocol.messages import Need
from fleet_server.db import Database
from fleet_server.deltas import service as deltas
from fleet_server.enrolment import service as enrolment
from fleet_server.gates import service as gates
from fleet_server.gateway.delivery import Delivery
from fleet_server.models import Variant
from fleet_server.rollouts import repository as rollouts_repository
from fleet_server.rollouts.desired import contents_of_variant

log = logging.getLogger(__name__)
ENTITLED_S = 5.0  # one that is locked out is disconnected within that time too
ENTITLED_KEPT = 50_000
Wanted = tuple[str, str]  # a device and a digest


@dataclass(frozen=True)
class _Entitled:
    """A device may have a content of so many chunks, as the database said a moment ago."""

    chunks: int
    until: float


class Needs:
    """Brings the delivery what devices lack and may have. One thread takes them in.

    Args:
        database: says who may have what.
        delivery: sends it.
        streams: whether a content is this server's to send.
    """

    def __init__(self, database: Database, delivery: Delivery, streams: Callable[[str], bool]) -> None:
        self._database = database
        self._delivery = delivery
        self._streams = streams
        self._entitled: dict[Wanted, _Entitled] = {}

    def take(self, said: Sequence[tuple[str, Need]]) -> None:
        """Take in what devices said, in this order. A device is sent only what it ought to run, or to measure."""
        ours = [(device_id, need) for device_id, need in said if self._streams(need.digest)]
        self._ask({(device_id, need.digest) for device_id, need in ours})
        for device_id, need in ours:
            found = self._entitled.get((device_id, need.digest))
            if found is not None:
                self._delivery.hear(device_id, need, found.chunks)

    def _ask(self, wanted: Collection[Wanted]) -> None:
        """See who of them is entitled, but for those of whom it was seen a moment ago."""
        now = time.monotonic()
        unknown = {key for key in wanted if key not in self._entitled or now > self._entitled[key].until}
        if not unknown:
            return
        for key in unknown:
            self._entitled.pop(key, None)
        with self._database.read() as session:
            found = entitled(session, unknown)
        if len(self._entitled) + len(found) > ENTITLED_KEPT:
            self._entitled = {key: self._entitled[key] for key in wanted if key in self._entitled}
        until = time.monotonic() + ENTITLED_S
        self._entitled |= {key: _Entitled(chunk_count(content), until) for key, content in found.items()}


def entitled(session: Session, wanted: Collection[Wanted]) -> dict[Wanted, Content]:
    """The contents that devices want and may have: what they ought to run or measure, or make that of.

    One that is locked out may have none.
    """
    device_ids = sorted({device_id for device_id, _ in wanted})
    out = enrolment.locked_out(session, device_ids)
    deployments = rollouts_repository.desired_on(session, device_ids)
    ids = {one.variant_id for of_device in deployments.values() for one in of_device}
    variants = rollouts_repository.by_id(session, Variant, ids)
    contents = {key: {one.digest: one for one in contents_of_variant(row)} for key, row in variants.items()}
    found = {}
    for device_id, digest in sorted(wanted):
        if device_id in out:
            continue
        of_device = (contents[one.variant_id].get(digest) for one in deployments.get(device_id, ()))
        content = next((one for one in of_device if one is not None), None)
        content = content or gates.entitled(session, device_id, digest) or deltas.entitled(session, device_id, digest)
        if content is not None:
            found[device_id, digest] = content
        else:
            log.info("device %s asked for %s, which it is neither to run nor to measure", device_id, digest[:12])
    return found
