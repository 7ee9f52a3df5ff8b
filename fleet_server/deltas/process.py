"""One encoding made in a bounded child process: `python -m fleet_server.deltas.process FOLDER`.

The folder holds `target` and, for a difference, `base`. It leaves the encoding's bytes in `encoded` and says in
`result.json` what they are. What it made it has decoded again, by the very process that devices run.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from agent.parent import end_with_parent
from agent.protocol.delta import ZSTD
from fleet_server.deltas.encode import Encoded, encode_difference, encode_full

ENCODED, RESULT = "encoded", "result.json"
SUFFIXES_SHARE = 20  # of the memory it may use: bsdiff's suffix sort takes 17 times the base
NICE = 10


def main() -> int:
    """Make one encoding."""
    parser = argparse.ArgumentParser(prog="fleet_server.deltas.process", description="Started by the server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory-mb", type=int, default=2048)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args()
    end_with_parent(options.parent)
    os.nice(NICE)
    bound = options.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    folder: Path = options.folder
    base, target = folder / "base", folder / "target"
    if base.exists():
        made = encode_difference(base, target, folder, suffixes_mb=options.memory_mb / SUFFIXES_SHARE)
    else:
        made = encode_full(target, folder)
    verify(made, base if base.exists() else None, target, folder / "decoded")
    made.path.replace(folder / ENCODED)
    (folder / RESULT).write_text(json.dumps({"codec": made.codec, "plan": made.plan, "size": made.size}))
    return 0


def verify(made: Encoded, base: Path | None, target: Path, decoded: Path) -> None:
    """Decode what was made, as a device would.

    Raises:
        ValueError: when other bytes come out.
    """
    command = [sys.executable, "-m", "agent.update.decode", made.codec, str(made.path)]
    command += [str(base) if base is not None and made.codec != ZSTD else "", str(decoded)]
    done = subprocess.run([*command, str(target.stat().st_size), "0"], capture_output=True, check=False)
    if done.returncode != 0 or not filecmp.cmp(decoded, target, shallow=False):
        raise ValueError(f"{made.codec} by {made.plan} does not decode: {done.stdout[:300]!r} {done.stderr[-500:]!r}")
    decoded.unlink()


if __name__ == "__main__":
    sys.exit(main())
