"""Servers of others that `make bench-serving` measures beside Shoal's, each in an environment of its own.

`make setup-serving-peers` makes the environments. Each server is written as its own documentation would have it, and is
asked in the cheapest way that it offers: raw bytes where it takes them, else base64 in JSON; never numbers as text.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.benchmarks.common import oip_request
from tests.fleet import free_port, wait_until

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[2] / ".venv-serving-peers"
START_S = 120.0


@dataclass(frozen=True)
class Peer:
    """One of them.

    Attributes:
        name: as its documentation writes it; in small letters also of its script (`with_…`) and environment.
        path: where it is asked.
        form: `raw`, `json` (base64 under `x`), `oip-json` or `oip` (with the binary extension).
    """

    name: str
    path: str
    form: str

    @property
    def python(self) -> Path:
        """Of its environment."""
        return ENVIRONMENTS / self.name.lower() / "bin" / "python"

    def request(self, row: Any) -> bytes:
        """An HTTP request for one row, fp32 `(1, features)`, of the model `small`."""
        if self.form == "oip":
            return oip_request("small", row)
        body: bytes = row.tobytes()
        text = base64.b64encode(body).decode()
        if self.form == "json":
            body = msgspec.json.encode({"x": text})
        elif self.form == "oip-json":
            tensor = {"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
            body = msgspec.json.encode({"inputs": [tensor]})
        kind = "application/octet-stream" if self.form == "raw" else "application/json"
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nContent-Type: {kind}"
        return head.encode() + b"\r\n\r\n" + body


FASTAPI = Peer("FastAPI", "/infer", "raw")
PEERS = (
    Peer("LitServe", "/infer", "json"),
    Peer("MLServer", "/v2/models/small/infer", "oip-json"),
    Peer("BentoML", "/infer", "json"),
    Peer("PyTriton", "/v2/models/small/infer", "oip"),
    Peer("RayServe", "/infer", "raw"),
)


@contextlib.contextmanager
def serving(
    peer: Peer, model: Path, row: Any, folder: Path, *, python: Path | None = None
) -> Iterator[tuple[str, int]]:
    """The peer with a model, from when it answers a row until it has ended with all that it started.

    Args:
        peer: which.
        model: ONNX file with an input `x` and one output.
        row: it is asked until it answers this one.
        folder: it runs and logs there.
        python: of another environment than its own.
    """
    port, log = free_port(), folder / f"{peer.name}.log"
    script = HERE / f"with_{peer.name.lower()}.py"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python or peer.python), str(script), str(model), str(port)],
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    head, _, body = peer.request(row).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[2:])

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{peer.name} ended: {log.read_text()[-2000:]}")
        url = f"http://127.0.0.1:{port}{peer.path}"
        return httpx.post(url, content=body, headers=headers, timeout=5).status_code == 200

    try:
        wait_until(peer.name, answers, START_S)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def absent() -> list[str]:
    """The peers that have no environment here."""
    missing = [peer.name for peer in PEERS if not peer.python.exists()]
    if missing:
        print(f"not measured, for `make setup-serving-peers` was not run: {', '.join(missing)}", file=sys.stderr)
    return missing
