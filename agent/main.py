"""`shoal-agent`: where the daemon begins. The worker comes first, the command line is read while it starts."""

from __future__ import annotations

import gc
import sys

from agent.head_start import spawn_for
from agent.releases.handover import take


def main() -> None:
    """Run the daemon, enrol the device, or print this machine's facts."""
    inherited = take()
    spawned = spawn_for(sys.argv[1:])
    gc.disable()  # as the worker does, until all is imported
    from agent.command_line import run

    run(spawned, inherited)


if __name__ == "__main__":
    main()
