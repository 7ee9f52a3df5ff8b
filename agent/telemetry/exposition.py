"""Prometheus' text format (version 0.0.4), written by hand: its library would be a dependency of every device. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = Mapping[str, str]


@dataclass
class Family:
    """What is measured by one name.

    Attributes:
        name: as Prometheus has it; of a counter with its `_total`.
        kind: `counter`, `gauge` or `histogram`.
        meaning: a sentence.
        lines: of its samples.
    """

    name: str
    kind: str
    meaning: str
    lines: list[str] = field(default_factory=list)

    def add(self, value: float, labels: Labels | None = None) -> Family:
        """One sample; returns the family."""
        self.lines.append(f"{self.name}{_labels(labels or {})} {_number(value)}")
        return self

    def add_histogram(self, bounds: Sequence[float], counts: Mapping[float, int], total: float, labels: Labels) -> None:
        """A histogram of numbers that were counted apart.

        Args:
            bounds: of the buckets that are told, ascending; the last one is without a bound.
            counts: by the number that was counted, or that stands for those that were.
            total: sum of all that was counted.
            labels: of the samples.
        """
        for bound in (*bounds, float("inf")):
            below = sum(count for number, count in counts.items() if number <= bound)
            self.lines.append(f"{self.name}_bucket{_labels({**labels, 'le': _number(bound)})} {below}")
        self.lines.append(f"{self.name}_sum{_labels(labels)} {_number(total)}")
        self.lines.append(f"{self.name}_count{_labels(labels)} {sum(counts.values())}")


def exposition(families: Iterable[Family]) -> bytes:
    """The text of all families that have samples."""
    lines = []
    for one in families:
        if one.lines:
            lines += [f"# HELP {one.name} {_escaped(one.meaning)}", f"# TYPE {one.name} {one.kind}", *one.lines]
    return "".join(f"{line}\n" for line in lines).encode()


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    said = ",".join(f'{name}="{_escaped(value).replace(chr(34), chr(92) + chr(34))}"' for name, value in labels.items())
    return f"{{{said}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
