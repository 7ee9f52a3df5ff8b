"""How large outputs are, as far as answers have shown: shared memory must be offered before it is known. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

KINDS_LIMIT = 64
MISFITS_MOST = 3  # answers of a kind of request that were not as those before, until nothing is expected of it
# Below, a copy through the socket costs no more than the words about a region: measured, 1 client, Unix socket.
SHARED_FROM = 64 << 10


@dataclass
class _Kind:
    sizes: dict[str, int] = field(default_factory=dict)
    versions: set[str] = field(default_factory=set)
    misfits: int = 0


class Sizes:
    """Of the outputs of requests, by their kind: those that are alike but for the numbers in their inputs."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}

    def outputs(self, kind: Hashable) -> tuple[str, ...]:
        """The outputs that an answer has; none where that is not known."""
        found = self._kinds.get(kind)
        return tuple(found.sizes) if found is not None else ()

    def large(self, kind: Hashable) -> dict[str, int]:
        """How many bytes those have that are worth shared memory; none where that is not known, or changes."""
        found = self._kinds.get(kind)
        if found is None or found.misfits >= MISFITS_MOST:
            return {}
        return {name: size for name, size in found.sizes.items() if size >= SHARED_FROM}

    def knows(self, kind: Hashable, version: str) -> bool:
        """Whether a version's outputs are those that were asked for."""
        found = self._kinds.get(kind)
        return found is not None and version in found.versions

    def learn(self, kind: Hashable, version: str, sizes: Mapping[str, int]) -> None:
        """What an answer had in it; an output of no size that says anything, such as strings, with 0."""
        found = self._kinds.get(kind) or _Kind(dict(sizes), {version})
        if found.sizes.keys() != sizes.keys():
            found = _Kind(dict(sizes), {version}, found.misfits + 1)
        found.versions.add(version)
        found.sizes = {name: max(size, sizes[name]) for name, size in found.sizes.items()}
        if kind not in self._kinds and len(self._kinds) >= KINDS_LIMIT:
            self._kinds.pop(next(iter(self._kinds), None), None)
        self._kinds[kind] = found

    def misfit(self, kind: Hashable) -> None:
        """What was asked for by these sizes could not be given."""
        found = self._kinds.get(kind)
        if found is not None:
            found.misfits += 1
