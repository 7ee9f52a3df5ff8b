"""The wheel with each extra alone, in environments of their own: `python -m deploy.release.extras [EXTRA …]`.

Each is made afresh, gets the wheel with one extra in the versions that are pinned, and does what the extra is for, as
far as that takes no other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from deploy.release.python_packages import build_wheel
from deploy.release.sources import ROOT

HEAVY = ("torch", "fastapi", "sqlalchemy", "pydantic", "onnx", "typer", "httpx")
LIGHT = f"import sys; from importlib.util import find_spec; sys.exit([n for n in {HEAVY} if find_spec(n)] or 0)"
AGENT = "import agent.supervisor"
RUNTIME = f"{AGENT}, agent.serving.worker"  # numpy comes with one
CONVERT = "import onnx, psutil, converters.pipeline; import onnxruntime.quantization.matmul_nbits_quantizer"
LIGHTER = "from importlib.util import find_spec; assert not find_spec('torch')"
# What is run in the environment of each extra, by `python -c`; "" is the wheel without any.
DOES = {
    "": f"{AGENT}; {LIGHT}",
    "cpu": f"{RUNTIME}; import onnxruntime, agent.runtimes.onnx; {LIGHT}",
    "gpu": f"{RUNTIME}; import onnxruntime, agent.runtimes.onnx; {LIGHT}",
    "tflite": f"{RUNTIME}; import ai_edge_litert.interpreter, agent.runtimes.litert; {LIGHT}",
    "torch": f"{RUNTIME}; import torch, agent.runtimes.torch_export",
    "cli": "import fleet_server.cli.main",
    "cli-top": "import fleet_server.cli.main, textual, fleet_server.cli.top_app",
    "server": "import fleet_server.app, fleet_server.cli.server_main",
    "pkcs11": f"{AGENT}; import pkcs11, agent.pkcs11_key",
    "lan": f"{AGENT}; import zeroconf, agent.peers.mdns",
    "images": f"{AGENT}; import PIL.Image",
    "grpc": f"{AGENT}; import grpc, google.protobuf, agent.serving.rpc.schema",
    "convert-onnx": f"{CONVERT}; import onnxruntime.transformers.optimizer; {LIGHTER}",
    "convert": f"{CONVERT}; import torch, torch_pruning, onnxscript, converters.training.compress",
    "convert-tflite": f"{CONVERT}; import litert_torch, ai_edge_quantizer",
    "dask": "import distributed",
    "otel": "import opentelemetry.sdk.trace, opentelemetry.exporter.otlp.proto.http",
    "plot": "import matplotlib.pyplot",
    "dev": "import pytest, ruff, fleet_server.app, converters.pipeline",
    "fuzz": "import atheris",
}
BIG = ("dev",)  # everything at once: `make setup` installs it


def main() -> None:
    """Try those that are named, else all but the development environment."""
    parser = argparse.ArgumentParser(prog="deploy.release.extras", description=__doc__)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=", ".join(one for one in DOES if one))
    options = parser.parse_args()
    unknown = [one for one in options.extras if one not in DOES]
    if unknown:
        parser.error(f"there is no extra {unknown[0]}")
    failed = []
    with tempfile.TemporaryDirectory() as name:
        wheel = build_wheel(Path(name))
        for extra in options.extras or [one for one in DOES if one not in BIG]:
            problem = _try(extra, wheel)
            if problem:
                failed.append(extra)
                print(f"{extra or '(none)':<15} FAILED\n{problem[-3000:]}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _try(extra: str, wheel: Path) -> str:
    """What went wrong; empty where nothing did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        wanted = f"shoal[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command in (
            [*pip, "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), wanted],
            [*pip, "check"],
            [python, "-c", DOES[extra]],
        ):
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, env=environment)
            if done.returncode:
                return f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        listed = subprocess.run(
            [*pip, "list", "--format", "json"], capture_output=True, text=True, check=True, env=environment
        )
        count = len([one for one in json.loads(listed.stdout) if one["name"] not in {"pip", "setuptools"}])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        print(f"{extra or '(none)':<15} {count:>4} packages {size / 1e6:>7.0f} MB", flush=True)
        return ""


if __name__ == "__main__":
    main()
