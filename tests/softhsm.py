"""SoftHSM (Debian: softhsm2), a PKCS #11 module without hardware. It reads its configuration once a process."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "1234"


@dataclass(frozen=True)
class SoftHsm:
    """Two tokens, `shoal test` and `shoal`, and the file with their PIN."""

    module: Path
    configuration: Path
    pin_file: Path


def installed() -> bool:
    return MODULE.exists() and shutil.which("softhsm2-util") is not None


def make(folder: Path) -> SoftHsm:
    """Make the configuration and the tokens; `SOFTHSM2_CONF` must name the one before the other."""
    (folder / "tokens").mkdir()
    made = SoftHsm(MODULE, folder / "softhsm2.conf", folder / "pin")
    made.configuration.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    made.pin_file.write_text(f"{PIN}\n")
    for label in ("shoal test", "shoal"):
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "4321"],
            check=True,
            capture_output=True,
            env={"SOFTHSM2_CONF": str(made.configuration)},
        )
    return made
