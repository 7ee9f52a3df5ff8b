"""Numbers on a page, and those that the API gave for it, as pages write them."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleet_server.web.pages.overview import SPANS
from fleet_server.web.templating import number, percent, size, span

TEMPLATES = Path(__file__).resolve().parents[1] / "fleet_server" / "web" / "templates"
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")
_HIDDEN = re.compile(
    r'<(script|style|time|select|datalist|head|pre)\b.*?</\1>|<td class="n index">\d+</td>|<!--.*?-->',
    re.DOTALL | re.IGNORECASE,
)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d:\d\d)?|\d+(?:\.\d+)? (?:s|min|h|d) ago|in \d+ (?:s|min|h|d)\b")
_TAG = re.compile(r"<[^>]*>")
_DIGEST = re.compile(r"[0-9a-f]{64}")
BEGINNINGS = (12, 16)  # letters of a digest, which pages show


def shown(page: str) -> set[str]:
    """Numbers in the text of a page, but for times, which tell how long ago something was, and numbers of rows."""
    text = html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", page)))
    return set(_NUMBER.findall(_MOMENT.sub(" ", text)))


def printed() -> set[str]:
    """Numbers in the words of the templates themselves, and choices of how much time is shown."""
    words = (_TAG.sub(" ", re.sub(r"\{[{%].*?[}%]\}", " ", one.read_text())) for one in TEMPLATES.glob("*.html"))
    return set(itertools.chain.from_iterable(map(_NUMBER.findall, [*words, *SPANS])))


def told(answers: Any) -> set[str]:
    """Every way in which a page may write the numbers in answers: as they are, rounded, as share, size or duration.

    A list tells how long it is, what is counted from 0, such as stages, is shown from 1, and a digest by its beginning.
    """
    found: set[str] = set()
    for value in _values(answers):
        if isinstance(value, str):
            found.update(_NUMBER.findall(value))
            if _DIGEST.fullmatch(value):
                found.update(itertools.chain.from_iterable(_NUMBER.findall(value[:length]) for length in BEGINNINGS))
            continue
        texts = [str(value), str(value + 1), size(value), span(value)]
        texts += [f"{value:g}", *(number(value, digits) for digits in (2, 3, 4))]
        texts += [percent(value, digits) for digits in (0, 1, 2)]
        found.update(itertools.chain.from_iterable(map(_NUMBER.findall, texts)))
    return found


def _values(answer: Any) -> Iterator[Any]:
    if isinstance(answer, dict):
        yield from answer
        yield from itertools.chain.from_iterable(map(_values, answer.values()))
    elif isinstance(answer, list):
        yield len(answer)
        yield from itertools.chain.from_iterable(map(_values, answer))
    elif answer is not None and not isinstance(answer, bool):
        yield answer
