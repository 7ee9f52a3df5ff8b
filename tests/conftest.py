"""For every test: what its processes may take of the machine, and in which order files come."""

from __future__ import annotations

import gc
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import certifi
import pytest

# Before anything imports a library that counts in threads. Test processes and their children share the processors:
# threads of small nets, which wait for each other at every layer, then cost several times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every client of HTTP that is made, as each `httpx.get` and each command makes one, first reads all authorities of the
# web, which takes longer than a request. No test meets any of them: one is enough. It goes with this process.
AUTHORITY = tempfile.NamedTemporaryFile(prefix="shoal-tests-", suffix=".pem")  # noqa: SIM115
AUTHORITY.write(Path(certifi.where()).read_bytes().partition(b"-----END CERTIFICATE-----")[0])
AUTHORITY.write(b"-----END CERTIFICATE-----\n")
AUTHORITY.flush()
os.environ["SSL_CERT_FILE"] = AUTHORITY.name

# To look for garbage while every test is collected, of which all stays, takes a sixth of that time.
gc.disable()

# Folders whose files mostly wait for processes that they started, those that take longest first. The others keep a
# processor busy. Files of both kinds come in turn, so that while some test processes wait others have work.
WAITING = ("e2e", "faults", "browser", "integration")
# A file is one process's: the last of those that wait begins when there are so many of the others left to do.
LEFT = 0.15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait and files that work in turn; within a folder the order stays."""
    folders: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(file_of(item) for item in items):
        folder = name.removeprefix("tests/").partition("/")[0]
        folders[folder if folder in WAITING else ""].append(name)
    waiting = [name for folder in WAITING for name in folders[folder]]
    folders[""].sort(key=lambda name: "/converters/" not in name)  # which take longest
    places = {name: number / len(waiting) * (1 - LEFT) for number, name in enumerate(waiting)}
    places |= {name: number / len(folders[""]) for number, name in enumerate(folders[""])}
    items.sort(key=lambda item: places[file_of(item)])


def pytest_collection_finish() -> None:
    """From now on there is garbage, and it is not to be looked for among what stays."""
    gc.freeze()
    gc.enable()


def file_of(item: pytest.Item) -> str:
    """Its name from the root of the repository on."""
    return item.nodeid.partition("::")[0]
