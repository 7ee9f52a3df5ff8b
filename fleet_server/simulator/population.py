"""The devices of a simulated fleet: who each one is, drawn from the behaviours. Pure."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator

import msgspec
import numpy as np

from agent.protocol.commands import CommandKind
from agent.protocol.facts import DeviceFacts
from agent.protocol.manifest import Manifest
from agent.protocol.topics import check_device_id
from fleet_server.simulator.behaviours import (
    SPAN,
    Behaviours,
    BehavioursError,
    Conduct,
    DeviceClass,
    Effect,
    Fault,
    facts_of,
)
from fleet_server.simulator.chances import Distribution, Purpose, draw, shares, stream


class Traits(msgspec.Struct, frozen=True):
    """What one device is: drawn once.

    Attributes:
        device_id: its id.
        index: its number in the fleet: with the seed it decides everything that is left to chance.
        class_name: of its class.
        facts: as it reports them.
        conduct: its own numbers in the place of distributions.
        latency_factor: how many times as long its answers take as its class's.
        faults: names of those that it has.
    """

    device_id: str
    index: int
    class_name: str
    facts: DeviceFacts
    conduct: Conduct
    latency_factor: float
    faults: tuple[str, ...]


def populate(behaviours: Behaviours, devices: int, seed: int, *, first: int = 0, prefix: str = "sim") -> list[Traits]:
    """The devices of a fleet.

    Args:
        behaviours: what they do.
        devices: how many.
        seed: of everything that is left to chance.
        first: number of the first one: several processes have parts of one fleet.
        prefix: their ids begin with it.

    Raises:
        BehavioursError: when classes count more devices than there are, or the prefix makes no ids.
    """
    try:
        check_device_id(f"{prefix}-00000")
    except ValueError as error:
        raise BehavioursError(f"prefix: {error}") from None
    placed = _place(behaviours.classes, devices, seed, first)
    facts = [facts_of(one) for one in behaviours.classes]
    return [
        _traits(behaviours, behaviours.classes[which], facts[which], seed, first + offset, prefix)
        for offset, which in enumerate(placed)
    ]


def fits(effect: Effect, manifest: Manifest, traits: Traits) -> bool:
    """Whether an effect is for this version on this device, but for its share."""
    where = effect.where
    return (
        fnmatch.fnmatchcase(f"{manifest.model}@{manifest.version}", effect.version)
        and where.device_class in {None, traits.class_name}
        and where.profile in {None, manifest.profile}
        and all(traits.facts.tags.get(name) == value for name, value in where.tags.items())
    )


def _place(classes: tuple[DeviceClass, ...], devices: int, seed: int, first: int) -> list[int]:
    """Which class each device is of, in an order that mixes them."""
    counted = [one.count or 0 for one in classes]
    left = devices - sum(counted)
    sharing = [index for index, one in enumerate(classes) if one.count is None]
    if left < 0 or (left > 0 and not sharing):
        raise BehavioursError(
            f"classes: their counts are of {sum(counted)} devices, and {devices} are simulated: make them agree, or "
            "give one class a share in place of its count"
        )
    for index, count in zip(sharing, shares(left, (classes[one].share for one in sharing)), strict=False):
        counted[index] = count
    placed = [index for index, count in enumerate(counted) for _ in range(count)]
    return [placed[one] for one in stream(seed, first, Purpose.PLACING).permutation(devices)]


def _traits(behaviours: Behaviours, one: DeviceClass, facts: DeviceFacts, seed: int, index: int, prefix: str) -> Traits:
    chance = stream(seed, index, Purpose.TRAITS)
    tags = {**facts.tags, **{name: _tag(values, chance) for name, values in one.tags.items()}}
    conduct = Conduct(**{name: getattr(one, name) for name in Conduct.__struct_fields__})
    factor = draw(Distribution(lognormal=(1.0, conduct.latency.device_sigma)), chance)
    names = []
    for number, fault in enumerate(behaviours.faults):
        if stream(seed, index, Purpose.FAULTS, number).random() < fault.share:
            names.append(fault.name or f"fault {number + 1}")
            conduct, factor = _with(conduct, fault), factor * fault.slower
    return Traits(
        device_id=f"{prefix}-{index:05d}",
        index=index,
        class_name=one.name,
        facts=msgspec.structs.replace(
            facts, tags=tags, commands={kind.value: kind not in conduct.commands.forbidden for kind in CommandKind}
        ),
        conduct=_drawn(conduct, chance),
        latency_factor=factor,
        faults=tuple(names),
    )


def _with(conduct: Conduct, fault: Fault) -> Conduct:
    same = set(Conduct.__struct_fields__) & set(Fault.__struct_fields__)
    return msgspec.structs.replace(
        conduct, **{name: value for name in same if (value := getattr(fault, name)) is not None}
    )


def _drawn(conduct: Conduct, chance: np.random.Generator) -> Conduct:
    """A device's own numbers in the place of distributions."""
    replace = msgspec.structs.replace
    return replace(
        conduct,
        requests=replace(conduct.requests, per_s=max(draw(conduct.requests.per_s, chance), 0.0)),
        latency=replace(conduct.latency, median_ms=max(draw(conduct.latency.median_ms, chance), 0.001)),
        link=replace(conduct.link, bytes_s=max(draw(conduct.link.bytes_s, chance), 1.0)),
        clock_offset_s=draw(conduct.clock_offset_s, chance),
        load_s=max(draw(conduct.load_s, chance), 0.0),
        commands=replace(conduct.commands, delay_s=max(draw(conduct.commands.delay_s, chance), 0.0)),
    )


def _tag(values: str | list[str] | dict[str, float], chance: np.random.Generator) -> str:
    if isinstance(values, dict):
        weights = np.array(list(values.values()))
        return _tag([str(chance.choice(list(values), p=weights / weights.sum()))], chance)
    every = list(itertools.chain.from_iterable(map(_expanded, [values] if isinstance(values, str) else values)))
    return every[int(chance.integers(len(every)))]


def _expanded(text: str) -> Iterator[str]:
    """`plant{1..3}` as plant1, plant2 and plant3."""
    span = SPAN.search(text)
    if span is None:
        yield text
        return
    for number in range(int(span[1]), int(span[2]) + 1):
        yield from _expanded(f"{text[: span.start()]}{number}{text[span.end() :]}")
