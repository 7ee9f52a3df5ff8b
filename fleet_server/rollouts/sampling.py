"""What devices are told of samples: which they are to keep, and what of them they are to send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.protocol.delivery import DeliveryPolicy
from agent.protocol.limits import LIMITS, MIB
from agent.protocol.samples import SampleRequest, Sampling
from fleet_server.db import rows_by
from fleet_server.models import Device, Model, SampleRequestRow, SampleUpload, SamplingRule


class SampleOrders:
    """For some devices of one fleet, made of what is read for all of them together."""

    def __init__(self, session: Session, devices: Sequence[Device]) -> None:
        self._rules: dict[str, list[Sampling]] = defaultdict(list)
        profiles = sorted({one.profile_id for one in devices if one.profile_id})
        query = select(SamplingRule, Model.name).join(Model, Model.id == SamplingRule.model_id).order_by(Model.name)
        for rule, model in rows_by(session, query, SamplingRule.profile_id, profiles):
            self._rules[rule.profile_id].append(sampling_of(model, rule))
        self._session, self._ids = session, [one.id for one in devices]

    @cached_property
    def _uploads(self) -> Mapping[str, list[tuple[SampleUpload, SampleRequestRow]]]:
        """What devices are to send, by device; who asks only what they are to keep does without."""
        found: dict[str, list[tuple[SampleUpload, SampleRequestRow]]] = defaultdict(list)
        asked = (
            select(SampleUpload, SampleRequestRow)
            .join(SampleRequestRow, SampleRequestRow.id == SampleUpload.request_id)
            .where(SampleUpload.told.is_(True))
            .order_by(SampleUpload.id)
        )
        for upload, request in rows_by(self._session, asked, SampleUpload.device_id, self._ids):
            found[upload.device_id].append((upload, request))
        return found

    def sampling(self, device: Device) -> tuple[Sampling, ...]:
        """What a device is to keep."""
        return tuple(self._rules.get(device.profile_id or "", ())[: LIMITS.sampling])

    def requests(self, device: Device, delivery: DeliveryPolicy) -> tuple[SampleRequest, ...]:
        """What a device is to send, keeping to a policy."""
        mine = self._uploads.get(device.id, ())[: LIMITS.sample_requests]
        return tuple(
            SampleRequest(upload.id, request.model, request.samples, request.size, delivery) for upload, request in mine
        )


def sampling_of(model: str, rule: SamplingRule) -> Sampling:
    """A rule as devices are told it."""
    spec = rule.spec
    return Sampling(
        model=model,
        samples=spec["samples"],
        bytes=int(spec["megabytes"] * MIB),
        sample_bytes=int(spec["sample_megabytes"] * MIB),
        days=spec["days"],
        below=spec["below"],
    )
