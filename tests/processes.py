"""Processes that a process has started, found by their command lines while they come and go."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str:
    """Its words; nothing of one that ended between being listed and being asked."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def descendants(pid: int, words: str) -> list[psutil.Process]:
    """Those below a process whose command line holds some words."""
    return [one for one in psutil.Process(pid).children(recursive=True) if words in command_line(one)]
