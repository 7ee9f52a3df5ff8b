"""Ray Serve: a proxy and one replica, raw bytes in and out."""

import signal
import sys

import numpy as np
import ray
from net import session
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=100)
class Net:
    def __init__(self, path):
        self.net = session(path)

    async def __call__(self, request: Request) -> Response:
        row = np.frombuffer(await request.body(), np.float32).reshape(1, -1)
        return Response(self.net.run(None, {"x": row})[0].tobytes())


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(Net.bind(sys.argv[1]), route_prefix="/infer")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
