"""Runs inside the onnx2tf environment: `python onnx2tf_worker.py FOLDER PARENT`. Knows nothing of Shoal.

FOLDER holds `request.json`: the ONNX file and, of each input, a file with a real row. It writes `model.tflite` and
`tools.json` there, or `error.txt` with the reason, and then ends with 1, or with 3 where onnx2tf is not installed.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NOT_INSTALLED = 3
TOOLS = ("onnx2tf", "tensorflow", "tensorflow-cpu", "tf_keras", "onnx")


def main(folder: Path, parent: int) -> int:
    """Convert one ONNX file of fixed shapes; returns the exit status."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the conversion that asked has ended")
    _leave_the_network()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    request: dict[str, Any] = json.loads((folder / "request.json").read_text())
    try:
        import onnx2tf  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        (folder / "error.txt").write_text(str(error))
        return NOT_INSTALLED
    try:
        onnx2tf.convert(
            input_onnx_file_path=request["onnx"],
            output_folder_path=str(folder / "work"),
            # onnx2tf tries orders of axes and keeps what fits its own run of the net. On made-up inputs a wrong order
            # may fit too: real rows settle it.
            custom_input_op_name_np_data_path=[[name, path] for name, path in request["rows"].items()],
            **request["options"],
        )
        next((folder / "work").glob("*_float32.tflite")).replace(folder / "model.tflite")
    except Exception as error:  # noqa: BLE001 (onnx2tf raises anything)
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        return 1
    (folder / "tools.json").write_text(json.dumps({"python": platform.python_version(), **_versions()}))
    return 0


def _leave_the_network() -> None:
    """A network namespace of its own where the kernel grants one; proxies that answer nothing in any case."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNET) != 0:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ[name] = os.environ[name.lower()] = "http://127.0.0.1:9"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ""


def _versions() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
