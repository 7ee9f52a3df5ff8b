"""The supervisor stays light: started with only `agent/` to import from us, it loads no heavy library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "tuf",
    "cryptography",
    "urllib3",
    "torch",
    "numpy",
    "onnxruntime",
    "pydantic",
    "fastapi",
    "sqlalchemy",
    "typer",
    "httpx",
    "onnx",
    "grpc",
    "google.protobuf",
)
CODE = """
import sys
sys.path = [sys.argv[1]] + [p for p in sys.path if p and not p.endswith(sys.argv[2])]
import agent.supervisor, agent.main
ours = [name for name in sys.modules if name.split('.')[0] in ('converters', 'fleet_server')]
heavy = [name for name in sys.argv[3:] if name in sys.modules]
print(agent.__file__, *ours, *heavy)
"""


def test_the_supervisor_imports_nothing_heavy(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "agent", tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", CODE, str(tmp_path), ROOT.name, *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "agent" / "__init__.py")]
