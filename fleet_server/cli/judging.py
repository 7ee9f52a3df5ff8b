"""How `shoal rollout` shows what a rollout would do, what it does and why."""

from __future__ import annotations

from collections.abc import Callable

from fleet_server.cli.output import Json, Output, print_json, show_object, show_rows

RULE_COLUMNS: list[tuple[str, Callable[[Json], object]]] = [
    ("stops when", lambda row: f"{row['metric']} > {row['above']:g}"),
    ("against", lambda row: row["against"] or None),
    ("is", lambda row: None if row["value"] is None else f"{row['value']:.4g}"),
    ("samples", lambda row: row["samples"]),
    ("devices", lambda row: row["devices"]),
    ("evidence", lambda row: f"{row['evidence']:.3g} of {row['needed']:.3g}" if row["confidence"] else None),
    ("stands out", lambda row: row["profile"] or None),
    ("stops", lambda row: row["stops"]),
]


def show_explanation(found: Json, output: Output) -> None:
    """What a rollout does now, where its rules stand, and every decision."""
    if output is Output.JSON:
        print_json(found)
        return
    show_object(
        {
            "state": found["state"],
            "stage": f"{found['stage'] + 1} of {found['stages']}",
            "now": found["now"],
            "held": "; ".join(f"{one['device_id']}: {one['reason']}" for one in found["held"]) or None,
        },
        output,
    )
    show_rows(found["rules"], output, RULE_COLUMNS, empty="it has no stop rule")
    show_rows(
        found["verdicts"],
        output,
        [
            ("at", lambda row: row["at"][:19]),
            ("stage", lambda row: row["stage"] + 1),
            ("decision", lambda row: row["decision"]),
            ("reason", lambda row: row["reason"]),
        ],
        empty="nothing was decided yet",
    )


def show_comparison(found: Json, output: Output) -> None:
    """The cohort beside the version before, by profile."""
    if output is Output.JSON:
        print_json(found)
        return
    rows = [{**figure, "cohort": cohort} for cohort in found["cohorts"] for figure in cohort["figures"]]
    show_rows(
        rows,
        output,
        [
            ("profile", lambda row: f"{row['cohort']['profile']} ({row['cohort']['devices']})"),
            ("figure", lambda row: row["name"]),
            ("before", lambda row: _between(row["before"])),
            ("now", lambda row: _between(row["now"])),
            ("apart", lambda row: _apart(row["before"], row["now"])),
        ],
        empty="no device of it has reported a request yet",
    )


def _between(figure: Json | None) -> str | None:
    return None if figure is None else f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"


def _apart(before: Json | None, now: Json | None) -> str | None:
    """Whether the intervals do not meet."""
    if before is None or now is None:
        return None
    if now["low"] > before["high"]:
        return "more"
    return "less" if now["high"] < before["low"] else "no"


def show_preview(found: Json, output: Output) -> None:
    """What a rollout would do, and what is in its way."""
    if output is Output.JSON:
        print_json(found)
        return
    show_object(
        {
            "version": f"{found['model']}@{found['version']}",
            "devices": found["devices"],
            "takes at least": f"{found['at_least_s']:g} s, and downloads and probation",
            "the server sends": f"{found['broadcast_bytes']:,} bytes at least",
            "approvals": found["approvals_needed"] or None,
            "could start": found["starts"],
        },
        output,
    )
    show_rows(
        found["stages"],
        output,
        [
            ("stage", lambda row: row["stage"] + 1),
            ("devices", lambda row: row["devices"]),
            ("profiles", lambda row: ", ".join(f"{count} {name}" for name, count in row["profiles"].items()) or None),
            ("first", lambda row: ", ".join(row["first"][:3]) or None),
            ("seconds", lambda row: f"{row['at_least_s']:g}"),
            ("approval", lambda row: row["approval"]),
        ],
        empty="it has no stage",
    )
    show_rows(
        found["profiles"],
        output,
        [
            ("profile", lambda row: row["profile"]),
            ("devices", lambda row: row["devices"]),
            ("artifact", lambda row: (row["digest"] or "")[:12]),
            ("bytes", lambda row: f"{row['artifact_bytes']:,}"),
            ("measured on a device", lambda row: row["proven"]),
        ],
        empty="no profile has a variant",
    )
    show_rows(
        found["links"],
        output,
        [
            ("link", lambda row: row["link"]),
            ("devices", lambda row: row["devices"]),
            ("metered", lambda row: row["metered"]),
            ("bytes at most", lambda row: f"{row['bytes']:,}"),
        ],
        empty="no device would be sent anything",
    )
    show_rows(
        found["problems"],
        output,
        [
            ("in the way", lambda row: row["code"]),
            ("refused", lambda row: row["blocks"]),
            ("devices", lambda row: len(row["devices"])),
            ("why", lambda row: row["detail"]),
        ],
        empty="nothing is in its way",
    )
