"""BentoML, one worker."""

import base64
import os
import sys
from pathlib import Path

import bentoml
import numpy as np
from net import session


@bentoml.service(workers=1, traffic={"max_concurrency": 100}, logging={"access": {"enabled": False}})
class Net:
    def __init__(self):
        self.net = session(os.environ["NET"])

    @bentoml.api(route="/infer")
    async def infer(self, x: str) -> dict[str, str]:
        row = np.frombuffer(base64.b64decode(x), np.float32).reshape(1, -1)
        return {"y": base64.b64encode(self.net.run(None, {"x": row})[0].tobytes()).decode()}


if __name__ == "__main__":
    folder = str(Path(__file__).resolve().parent)
    os.environ |= {"NET": sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"}
    options = ["--working-dir", folder, "--host", "127.0.0.1", "--port", sys.argv[2]]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "with_bentoml:Net", *options])
