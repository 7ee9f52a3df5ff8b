"""The real agent, ended by SIGKILL at a point of its dealings with the disk: `run_agent POINT SIDE run …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agent.config import load_config
from agent.main import main
from tests.faults.disk import Disk, Plan


def begin() -> None:
    """Watch the state folder, then be `shoal-agent`."""
    point, side, *arguments = sys.argv[1:]
    state = load_config(Path(arguments[arguments.index("--config") + 1]), os.environ).state_dir
    state.mkdir(parents=True, exist_ok=True)
    Disk(state, Plan(int(point), side)).install()
    sys.argv = ["shoal-agent", *arguments]
    main()


if __name__ == "__main__":
    begin()
