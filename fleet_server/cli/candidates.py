"""What became of a variant's candidates: a table for the terminal, a plot, a Markdown report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType

from fleet_server.cli.output import WHOLE_WIDTH, Json, fail, rows_table
from fleet_server.domain.candidates import quality_of

Column = tuple[str, Callable[[Json], object]]
POINTS_PER_ROOT_MB = 160.0


def columns(candidates: Sequence[Json]) -> list[Column]:
    """Columns of a table of candidates."""
    plain = next(
        (one["measurements"] for one in candidates if one["precision"] == "fp32" and one["measurements"]), None
    )

    def measured(name: str, scale: float = 1.0) -> Callable[[Json], object]:
        def value(row: Json) -> object:
            found = (row["measurements"] or {}).get(name)
            return None if found is None else float(f"{found * scale:.4g}")

        return value

    def times(row: Json) -> object:
        if not row["measurements"] or not plain:
            return None
        return f"{row['measurements']['latency_p50_ms'] / plain['latency_p50_ms']:.2f}x"

    quality = quality_of(candidates)
    return [
        ("recipe", lambda row: ("* " if row.get("on_front") else "  ") + row["recipe"]),
        ("MB", measured("size", 1e-6)),
        ({"accuracy": "acc. %", "fidelity": "faithful %"}.get(quality, "agrees %"), measured(quality, 100)),
        ("p50 ms", measured("latency_p50_ms")),
        ("fp32", times),
        ("fate", lambda row: row.get("fate") or row["error"]),
    ]


def table(candidates: Sequence[Json], width: int) -> RenderableType:
    """Candidates for a terminal of so many characters: where it is narrow, their fates stand below the figures."""
    *figures, fate = columns(candidates)
    if width >= WHOLE_WIDTH:
        return rows_table(candidates, [*figures, fate])
    return Group(rows_table(candidates, figures), "", rows_table(candidates, [figures[0], fate]))


def plot(candidates: Sequence[Json], path: Path, *, title: str) -> None:
    """Accuracy against latency, size as the dot; a ring marks the Pareto front, and the legend names each dot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise fail("plots need matplotlib: pip install 'shoal[plot]'") from None
    built = [one for one in candidates if one["measurements"]]
    name = quality_of(built)
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(sorted(built, key=lambda row: row["measurements"]["latency_p50_ms"]), start=1):
        measured = one["measurements"]
        x, y = measured["latency_p50_ms"], 100 * (measured[name] or 0.0)
        picked = one.get("fate", "").startswith("picked")
        axes.scatter(
            x,
            y,
            s=20 + POINTS_PER_ROOT_MB * (measured["size"] / 1e6) ** 0.5,
            color="tab:green" if picked else "tab:blue" if one["within_budgets"] else "tab:red",
            edgecolors="black" if one.get("on_front") else "none",
            alpha=0.6,
            label=f"{number}  {one['recipe']}, {measured['size'] / 1e6:.3g} MB" + (" (picked)" if picked else ""),
        )
        # Dots that lie on one another have their numbers one above the other.
        axes.annotate(str(number), (x, y), xytext=(4, 5 + 9 * (number % 4)), textcoords="offset points", fontsize=8)
    axes.set(title=title, xlabel="median latency of one row, ms (logarithmic)", ylabel=f"{name}, %", xscale="log")
    axes.margins(0.15)
    axes.grid(alpha=0.3, which="both")
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, handlelength=0, markerscale=0,
        title="green picked, blue within budgets,\nred over; ring: Pareto front", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path)


def report(title: str, facts: Sequence[tuple[str, str]], candidates: Sequence[Json], picture: str | None) -> str:
    """A Markdown report of a conversion."""
    table = columns(candidates)
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in facts]
    lines += ["", "| " + " | ".join(name for name, _ in table) + " |", "|" + "---|" * len(table)]
    for one in candidates:
        cells = ["–" if (cell := value(one)) is None else str(cell).replace("|", "\\|").strip() for _, value in table]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A star marks the Pareto front: nothing else within budgets is as good in accuracy, latency and size.",
    ]
    lines += ["", f"![accuracy against latency]({picture})"] if picture else []
    for one in candidates:
        if one["lineage"]:
            steps = ", ".join(
                f"{step['name']} {({k: v for k, v in step['parameters'].items() if v not in (None, '')}) or ''}".strip()
                for step in one["lineage"]["passes"]
            )
            lines += ["", f"`{one['recipe']}`: {steps}"]
    return "\n".join(lines) + "\n"
