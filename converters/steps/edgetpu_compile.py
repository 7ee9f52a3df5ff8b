"""An 8-bit TFLite file compiled for Google's Edge TPU, by Coral's compiler, where it is on this machine.

What it maps becomes one operator that only the Edge TPU's delegate knows, so the result runs on the device alone; what
it does not map stays on the device's CPU. A file of which nothing was mapped is refused: it would run as before.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from converters.errors import ConversionError
from converters.step import Context, Parameter

COMPILER = "edgetpu_compiler"
SECONDS = 900
MISSING = (
    f"{COMPILER} is not on this machine's PATH: install it from Coral's Debian packages on the server, or on the "
    "workers that convert; it exists for x86-64 Linux only"
)
_OPERATORS = re.compile(r"^([A-Z][A-Z0-9_]+)\s+(\d+)\s+(\S.*)$")
_MAPPED = "Mapped to Edge TPU"


def compile_for_edge_tpu(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Compile a file; what the compiler says of operators goes into the record.

    Raises:
        ConversionError: `no_edgetpu_compiler` where there is none; `not_convertible` when it fails or maps nothing.
    """
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise ConversionError("no_edgetpu_compiler", MISSING)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        given = Path(folder) / "model.tflite"
        shutil.copyfile(source, given)
        command = [compiler, "--show_operations", "--timeout_sec", str(SECONDS), "--out_dir", folder, str(given)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS + 60, cwd=folder)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConversionError("not_convertible", f"{COMPILER} did not end well: {str(error)[:200]}") from None
        text = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
        made = Path(folder) / "model_edgetpu.tflite"
        if done.returncode != 0 or not made.is_file():
            raise ConversionError("not_convertible", f"{COMPILER} can't compile this net: {_reason(text)}")
        mapped, others = operators(text)
        if mapped == 0:
            detail = f"{COMPILER} mapped no operator to the Edge TPU ({_listed(others) or _reason(text)})"
            raise ConversionError("not_convertible", detail)
        found.update(compiler=version(text), mapped=mapped, on_cpu=sum(others.values()), reasons=_listed(others))
        shutil.move(made, target)


def operators(text: str) -> tuple[int, dict[str, int]]:
    """How many operators the compiler mapped, and how many it did not, by operator and its reason."""
    mapped, others = 0, dict[str, int]()
    for line in text.splitlines():
        row = _OPERATORS.match(line.strip())
        if row is None:
            continue
        name, count, status = row.group(1), int(row.group(2)), row.group(3).strip()
        if status == _MAPPED:
            mapped += count
        else:
            others[f"{name}: {status}"] = others.get(f"{name}: {status}", 0) + count
    return mapped, others


def version(text: str) -> str:
    """The compiler's version, as its first lines say it."""
    line = re.search(r"Edge TPU Compiler version (\S+)", text)
    return line.group(1) if line else "unknown"


def _listed(others: dict[str, int]) -> str:
    return "; ".join(f"{count} {name}" for name, count in list(others.items())[:8])


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"error|fail|invalid|unsupported|not ", line, re.IGNORECASE)]
    return (told or lines or ["it ended without a word"])[-1][:300]
