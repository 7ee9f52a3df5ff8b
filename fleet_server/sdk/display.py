"""How objects of the SDK look in a notebook: a small table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def table(title: str, facts: Mapping[str, object], rows: Sequence[Mapping[str, object]] = ()) -> str:
    """HTML of an object: its facts a line each, and rows below them. What strangers named is escaped."""
    left = "style='text-align:left'"
    lines = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(_said(value))}</td></tr>"
        for name, value in facts.items()
    )
    found = f"<div><strong>{escape(title)}</strong><table>{lines}</table>"
    if rows:
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_said(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        found += f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return found + "</div>"


def _said(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
