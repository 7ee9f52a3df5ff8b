"""The file that says how simulated devices behave: read and checked. Pure.

Docs: docs/simulator.md. Every field has a default, so a file says only what is out of the ordinary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from agent.protocol.commands import CommandKind
from agent.protocol.facts import DeviceFacts
from agent.protocol.limits import LIMITS
from fleet_server.devices import shipped
from fleet_server.simulator import facts as making
from fleet_server.simulator.chances import Distribution, Number

SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_VALUES = 10_000
YEAR_S = 365 * 86_400.0


class BehavioursError(Exception):
    """The file can't be used; the message names the field and what would mend it."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file; what it does not know is an error."""


class Requests(Part, frozen=True):
    """How often programs on the device ask its models.

    Attributes:
        per_s: requests a second and model, on the mean of a day.
        swing: how much more at the busiest hour, and less at the quietest, as a share of it, 0 to 1.
        peak_h: the busiest hour of the day, in UTC.
    """

    per_s: Number = 1.0
    swing: float = 0.0
    peak_h: float = 14.0


class Latency(Part, frozen=True):
    """How long an answer takes: lognormal, times a factor of the device that drifts.

    Attributes:
        median_ms: of all devices of the class.
        sigma: standard deviation of the logarithm, between requests.
        device_sigma: likewise, between devices.
        drift: how far a device's factor goes up and down, as a share.
        drift_s: in how many seconds it does so once.
    """

    median_ms: Number = 10.0
    sigma: float = 0.25
    device_sigma: float = 0.1
    drift: float = 0.0
    drift_s: float = 3600.0


class Labels(Part, frozen=True):
    """Feedback with labels.

    Attributes:
        share: of the answers that get a label.
        classes: how many there are.
        accuracy: share of right answers.
    """

    share: float = 0.0
    classes: int = 10
    accuracy: float = 0.95


class Answers(Part, frozen=True):
    """What a classifier answers.

    Attributes:
        classes: how many it knows; all are as frequent.
        confidence: mean of how sure it is.
        certainty: how little that varies: a Beta distribution of this many pseudo-observations.
    """

    classes: int = 10
    confidence: float = 0.9
    certainty: float = 20.0


class Fetch(StrEnum):
    """How artifacts come to a device."""

    PRETEND = "pretend"  # from a source of its own: the server is asked for nothing, and no byte travels
    MQTT = "mqtt"  # by the broker, chunk by chunk


class Link(Part, frozen=True):
    """The device's way to the world.

    Attributes:
        fetch: how artifacts come.
        bytes_s: at how many bytes a second they come, when that is pretended.
    """

    fetch: Fetch = Fetch.PRETEND
    bytes_s: Number = 10e6


class Offline(Part, frozen=True):
    """A device that is away again and again; it goes on serving, and tells of it later.

    Attributes:
        every_s: from the beginning of one absence to the next.
        for_s: how long it is away.
    """

    every_s: float
    for_s: float


class CommandConduct(Part, frozen=True):
    """How a device takes commands.

    Attributes:
        delay_s: how much longer each takes than it needs to.
        fails: share that fails.
        forbidden: those that its owner does not allow.
    """

    delay_s: Number = 0.0
    fails: float = 0.0
    forbidden: tuple[CommandKind, ...] = ()


class SampleConduct(Part, frozen=True):
    """How a device keeps samples.

    Attributes:
        allow: whether its owner allows any.
        fails: share of uploads that the device can't make.
    """

    allow: bool = True
    fails: float = 0.0


class Conduct(Part, frozen=True):
    """How a device behaves.

    Attributes:
        requests: how often it is asked.
        latency: how fast it answers.
        labels: feedback.
        answers: what it answers.
        error_rate: share of requests that fail.
        link: its way to the world.
        offline: when it is away; None for never.
        cuts_per_hour: how often its connection breaks, without a word.
        cut_s: for how long, on the mean.
        reboots_per_day: how often it starts anew, without a word.
        reboot_s: how long that takes.
        clock_offset_s: how far its clock is ahead.
        load_s: seconds to load a version.
        commands: what it does when it is asked to do something.
        samples: what it keeps, and sends when it is asked to.
    """

    requests: Requests = Requests()
    latency: Latency = Latency()
    labels: Labels = Labels()
    answers: Answers = Answers()
    error_rate: float = 0.0
    link: Link = Link()
    offline: Offline | None = None
    cuts_per_hour: float = 0.0
    cut_s: float = 5.0
    reboots_per_day: float = 0.0
    reboot_s: float = 10.0
    clock_offset_s: Number = 0.0
    load_s: Number = 0.5
    commands: CommandConduct = CommandConduct()
    samples: SampleConduct = SampleConduct()


class DeviceClass(Conduct, frozen=True, kw_only=True):
    """Devices of one kind.

    Attributes:
        name: for effects, and for people.
        share: of the devices that no `count` names; 1 each when nobody says.
        count: exactly so many; None for a share.
        profile: a shipped profile that its facts match.
        facts: its facts, where no shipped profile will do.
        tags: values by name. `plant{1..7}` is one of seven, a list is any of its values, a mapping has weights.
    """

    name: str
    share: float = 1.0
    count: int | None = None
    profile: str | None = None
    facts: dict[str, Any] | None = None
    tags: dict[str, str | list[str] | dict[str, float]] = {}


class Fault(Part, frozen=True):
    """What some devices of all classes do otherwise; what is not said stays as their class has it.

    Attributes:
        share: of the devices that have it.
        name: for people.
        slower: their answers take so many times as long.
    """

    share: float
    name: str = ""
    slower: float = 1.0
    error_rate: float | None = None
    link: Link | None = None
    offline: Offline | None = None
    cuts_per_hour: float | None = None
    cut_s: float | None = None
    reboots_per_day: float | None = None
    reboot_s: float | None = None
    clock_offset_s: Number | None = None
    commands: CommandConduct | None = None
    samples: SampleConduct | None = None


class Where(Part, frozen=True):
    """Which devices an effect is for; everything that is said must hold.

    Attributes:
        device_class: the name of their class.
        profile: what the version was built for on them.
        tags: of the device.
    """

    device_class: str | None = msgspec.field(default=None, name="class")
    profile: str | None = None
    tags: dict[str, str] = {}


class Effect(Part, frozen=True):
    """What a version does to devices that run it. The first effect that fits a device and a version counts.

    Attributes:
        version: `model@version`; `*` stands for anything.
        where: for which devices.
        share: of those.
        latency_ratio: how many times as long its answers take.
        error_rate: share of requests that fail.
        accuracy: share of right answers.
        confidence: mean of how sure it is.
        install_fails: share of the devices on which it can't be loaded.
        crash: share of the devices on which it ends the inference worker while it is watched.
    """

    version: str
    where: Where = Where()
    share: float = 1.0
    latency_ratio: float = 1.0
    error_rate: float | None = None
    accuracy: float | None = None
    confidence: float | None = None
    install_fails: float = 0.0
    crash: float = 0.0


class Behaviours(Part, frozen=True):
    """The whole file."""

    classes: tuple[DeviceClass, ...]
    faults: tuple[Fault, ...] = ()
    effects: tuple[Effect, ...] = ()


def read(text: str) -> Behaviours:
    """The behaviours of a file in YAML or JSON.

    Raises:
        BehavioursError: naming what is wrong, and the remedy.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BehavioursError(f"it is neither YAML nor JSON: {str(error)[:300]}") from None
    try:
        # By way of JSON a whole number is a number, and a date is refused as what it is.
        found = msgspec.json.decode(json.dumps(content, default=str), type=Behaviours)
    except msgspec.ValidationError as error:
        raise BehavioursError(f"{error}; docs/simulator.md lists every field") from None
    except TypeError as error:
        raise BehavioursError(str(error)) from None
    return check(found)


def of_profiles(mix: Mapping[str, float]) -> Behaviours:
    """Ordinary devices of shipped profiles, by share.

    Raises:
        BehavioursError: for a profile that there is not, or a share of nothing.
    """
    found = Behaviours(tuple(DeviceClass(name=name, share=share, profile=name) for name, share in mix.items()))
    return check(found)


def facts_of(one: DeviceClass) -> DeviceFacts:
    """The facts that devices of a class have in common.

    Raises:
        BehavioursError: when they can't be made.
    """
    where = f"classes: {one.name}"
    try:
        if one.facts is not None:
            return making.of_mapping(one.facts)
        return making.of_profile(shipped.load(one.profile or ""))
    except making.FactsError as error:
        raise BehavioursError(f"{where}: {error}") from None
    except KeyError:
        names = ", ".join(shipped.names())
        raise BehavioursError(
            f"{where}: no profile {one.profile!r} comes with Shoal; there are {names}; for another one give `facts`"
        ) from None


def check(found: Behaviours) -> Behaviours:
    """The same behaviours.

    Raises:
        BehavioursError: where they are impossible, naming the field and the remedy.
    """
    if not found.classes:
        raise BehavioursError("classes: it is empty: name at least one class of devices")
    names = [one.name for one in found.classes]
    if len(set(names)) < len(names):
        raise BehavioursError("classes: two have the same name")
    for one in found.classes:
        _check_class(one, f"classes: {one.name}")
    for number, fault in enumerate(found.faults):
        where = f"faults: {fault.name or number + 1}"
        _within(where, 0, 1, share=fault.share, error_rate=fault.error_rate)
        _within(where, 0, YEAR_S, slower=fault.slower, cuts_per_hour=fault.cuts_per_hour, cut_s=fault.cut_s)
        _within(where, 0, YEAR_S, reboots_per_day=fault.reboots_per_day, reboot_s=fault.reboot_s)
        _check_offline(where, fault.offline)
        _check_asked(where, fault.commands, fault.samples)
    for effect in found.effects:
        _check_effect(effect, names)
    return found


def _check_class(one: DeviceClass, where: str) -> None:
    if (one.profile is None) == (one.facts is None):
        raise BehavioursError(f"{where}: give either `profile`, a shipped one, or `facts`")
    _within(where, 0, 1e9, count=one.count)
    _within(where, 1e-9, 1e9, share=one.share)
    _within(where, 0, 1, error_rate=one.error_rate)
    _within(f"{where}: requests", 0, 1, swing=one.requests.swing)
    _within(f"{where}: requests", 0, 24, peak_h=one.requests.peak_h)
    _within(f"{where}: latency", 0, 3, sigma=one.latency.sigma, device_sigma=one.latency.device_sigma)
    _within(f"{where}: latency", 0, 0.99, drift=one.latency.drift)
    _within(f"{where}: latency", 1, YEAR_S, drift_s=one.latency.drift_s)
    _within(f"{where}: labels", 0, 1, share=one.labels.share, accuracy=one.labels.accuracy)
    _within(f"{where}: labels", 2, int(LIMITS.confusion_cells**0.5), classes=one.labels.classes)
    _within(f"{where}: answers", 0.01, 0.99, confidence=one.answers.confidence)
    _within(f"{where}: answers", 2, LIMITS.predicted_classes, classes=one.answers.classes)
    _within(f"{where}: answers", 0.1, 1e6, certainty=one.answers.certainty)
    _within(where, 0, YEAR_S, cuts_per_hour=one.cuts_per_hour, cut_s=one.cut_s)
    _within(where, 0, YEAR_S, reboots_per_day=one.reboots_per_day, reboot_s=one.reboot_s)
    for field, number in (("requests.per_s", one.requests.per_s), ("latency.median_ms", one.latency.median_ms)):
        if not isinstance(number, Distribution):
            _within(where, 0, 1e5, **{field: number})
    _check_offline(where, one.offline)
    _check_asked(where, one.commands, one.samples)
    for name, values in one.tags.items():
        if not values or (isinstance(values, dict) and not (min(values.values()) >= 0 < sum(values.values()))):
            raise BehavioursError(f"{where}: tags: {name}: give a text, a list of texts, or texts with weights above 0")
        spans = [span for text in ([values] if isinstance(values, str) else values) for span in SPAN.findall(text)]
        if any(not 0 <= int(last) - int(start) < _MOST_VALUES for start, last in spans):
            raise BehavioursError(f"{where}: tags: {name}: {{a..b}} goes from the smaller to the larger number")
    facts_of(one)


def _check_offline(where: str, offline: Offline | None) -> None:
    if offline is not None and not 0 < offline.for_s < offline.every_s <= YEAR_S:
        raise BehavioursError(f"{where}: offline: `for_s` must be above 0 and below `every_s`, which is at most a year")


def _check_asked(where: str, commands: CommandConduct | None, samples: SampleConduct | None) -> None:
    if commands is not None:
        _within(f"{where}: commands", 0, 1, fails=commands.fails)
        if not isinstance(commands.delay_s, Distribution):
            _within(f"{where}: commands", 0, YEAR_S, delay_s=commands.delay_s)
    if samples is not None:
        _within(f"{where}: samples", 0, 1, fails=samples.fails)


def _check_effect(effect: Effect, names: list[str]) -> None:
    where = f"effects: {effect.version}"
    if "@" not in effect.version:
        raise BehavioursError(f"{where}: write model@version, such as detector@2; * stands for anything")
    if effect.where.device_class is not None and effect.where.device_class not in names:
        raise BehavioursError(
            f"{where}: where: no class is called {effect.where.device_class!r}; there are {', '.join(names)}"
        )
    _within(where, 0, 1, share=effect.share, error_rate=effect.error_rate, accuracy=effect.accuracy)
    _within(where, 0.01, 0.99, confidence=effect.confidence)
    _within(where, 0, 1, install_fails=effect.install_fails, crash=effect.crash)
    _within(where, 0, 1e6, latency_ratio=effect.latency_ratio)


def _within(where: str, least: float, most: float, **numbers: float | None) -> None:
    for field, number in numbers.items():
        if number is not None and not least <= number <= most:
            raise BehavioursError(f"{where}: {field} is {number:g}, and must be from {least:g} to {most:g}")
