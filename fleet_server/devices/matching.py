"""Which profile a device has: pure, from its facts, its tags and the profiles there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fleet_server.devices.schemas import AtLeast, ProfileSpec, Scalar


@dataclass(frozen=True)
class NamedProfile:
    """A profile as matching sees it."""

    id: str
    name: str
    spec: ProfileSpec


def effective_tags(facts: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, str]:
    """The device's own tags, overlaid by those people gave it."""
    return {**facts.get("tags", {}), **tags}


def best_profile(
    facts: Mapping[str, Any], tags: Mapping[str, str], profiles: Iterable[NamedProfile]
) -> NamedProfile | None:
    """The profile with most conditions among those whose every condition holds; by name where that ties."""
    subject = {**facts, "tags": effective_tags(facts, tags)}
    fitting = [profile for profile in profiles if matches(subject, profile.spec)]
    return min(fitting, key=lambda profile: (-len(profile.spec.match), profile.name), default=None)


def matches(facts: Mapping[str, Any], spec: ProfileSpec) -> bool:
    """Whether a device with these facts (people's tags laid over its own) is of the kind `spec` describes.

    A device that lacks the profile's runtime never is.
    """
    if spec.runtime not in [runtime.get("name") for runtime in facts.get("runtimes", ())]:
        return False
    return all(_holds(_values(facts, path), wanted) for path, wanted in spec.match.items())


def _values(facts: Any, path: str) -> list[Any]:
    """Every value a dotted path leads to; a list of named structs is entered by name, or by a field of any of them."""
    if not path:
        return list(facts) if isinstance(facts, (list, tuple)) else [facts]
    if isinstance(facts, Mapping):
        if path in facts:
            return _values(facts[path], "")
        head, _, rest = path.partition(".")
        return _values(facts[head], rest) if head in facts else []
    if isinstance(facts, (list, tuple)):
        head, _, rest = path.partition(".")
        named = [item for item in facts if isinstance(item, Mapping) and item.get("name") == head]
        if named:
            return [value for item in named for value in _values(item, rest)]
        return [value for item in facts for value in _values(item, path)]
    return []


def _holds(values: list[Any], wanted: Scalar | list[Scalar] | AtLeast) -> bool:
    if isinstance(wanted, AtLeast):
        return any(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= wanted.min for v in values)
    accepted = wanted if isinstance(wanted, list) else [wanted]
    return any(_same(value, one) for value in values for one in accepted)


def _same(value: Any, wanted: Scalar) -> bool:
    """Equal, also where a number or a truth value is written as text: tags and command lines know only texts."""
    if isinstance(value, str) or isinstance(wanted, str):
        return _text(value) == _text(wanted)
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
