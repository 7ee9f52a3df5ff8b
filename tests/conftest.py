"""For every test: what its processes may take of the machine, and which files come first."""

from __future__ import annotations

import os

import pytest

# Before anything imports a library that counts in threads. Test processes and their children share the processors:
# threads of small nets, which wait for each other at every layer, then cost several times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Folders whose files take longest. A file is one process's: one of minutes that comes last keeps the others waiting.
FIRST = ("e2e", "faults", "browser", "integration", "unit/converters")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a folder the order stays."""

    def place(item: pytest.Item) -> int:
        folder = item.nodeid.removeprefix("tests/")
        return next((number for number, name in enumerate(FIRST) if folder.startswith(f"{name}/")), len(FIRST))

    items.sort(key=place)
