"""Runs inside the onnx2tf environment: `python onnx2tf_worker.py SOURCE FOLDER PARENT`. Knows nothing of Shoal.

Writes FOLDER/model.tflite and FOLDER/tools.json, or ends with the error's last line on standard error. Input shapes
are kept as they are; a 4-D output may come with its channels last.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
TOOLS = ("onnx2tf", "tensorflow")


def main(source: Path, folder: Path, parent: int) -> None:
    """Convert one ONNX file of fixed shapes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the conversion that asked has ended")
    # onnx2tf fetches sample pictures for nets that look like image nets, when it is left to guess layouts.
    os.environ.update(HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9", TF_CPP_MIN_LOG_LEVEL="3")
    import onnx
    import onnx2tf  # type: ignore[import-not-found, unused-ignore]

    names = [value.name for value in onnx.load(str(source)).graph.input]
    onnx2tf.convert(
        input_onnx_file_path=str(source),
        output_folder_path=str(folder / "work"),
        keep_shape_absolutely_input_names=names,
        output_signaturedefs=True,
        copy_onnx_input_output_names_to_tflite=True,
        non_verbose=True,
        verbosity="error",
    )
    next((folder / "work").glob("*_float32.tflite")).replace(folder / "model.tflite")
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    (folder / "tools.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
