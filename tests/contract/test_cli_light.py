"""`shoal` starts quickly: what it loads before it knows what is asked is neither the server's nor a converter's."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("sqlalchemy", "alembic", "fastapi", "torch", "onnx", "onnxruntime", "numpy", "dask", "paho", "textual")
CODE = "import sys, fleet_server.cli.main; print(*[name for name in sys.argv[1:] if name in sys.modules])"


def test_the_command_line_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_sdk_loads_nothing_heavy() -> None:
    code = CODE.replace("fleet_server.cli.main", "fleet_server.sdk")
    done = subprocess.run([sys.executable, "-c", code, *HEAVY, "typer"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
