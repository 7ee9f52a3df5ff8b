"""Reads a document that a person wrote: YAML or JSON, from a file or from standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fleet_server.cli.output import fail


def read_document(file: str, what: str, otherwise: str = "") -> dict[str, Any]:
    """What a file holds; ends the program with what is wrong with it.

    Args:
        file: its name, or - for standard input.
        what: it should hold one of, such as "profile".
        otherwise: said where it can't be read.
    """
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        found = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        # YAML knows dates and infinity, JSON does not: a date is meant as text.
        found = json.loads(json.dumps(found, default=str, allow_nan=False))
    except OSError as error:
        raise fail(f"{file} can't be read ({error.strerror}){otherwise}", 2) from None
    except (yaml.YAMLError, ValueError) as error:
        raise fail(f"{file} is neither YAML nor JSON: {error}", 2) from None
    if not isinstance(found, dict):
        raise fail(f"{file} does not hold one {what}", 2)
    return found
