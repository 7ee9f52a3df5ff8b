"""MLServer in one process (no parallel workers), its REST API; binary tensors it takes by gRPC alone."""

import asyncio
import base64
import sys

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceResponse, ResponseOutput
from net import session


class Net(MLModel):
    async def load(self):
        self.net = session(sys.argv[1])
        return True

    async def predict(self, payload):
        row = np.frombuffer(base64.b64decode(payload.inputs[0].data[0]), np.float32).reshape(1, -1)
        output = self.net.run(None, {"x": row})[0]
        text = base64.b64encode(output.tobytes()).decode()
        tensor = ResponseOutput(name="y", shape=[1, 1], datatype="BYTES", data=[text])
        return InferenceResponse(model_name=self.name, outputs=[tensor])


async def main():
    port = int(sys.argv[2])
    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    settings = Settings(host="127.0.0.1", parallel_workers=0, debug=False, use_structured_logging=False, **ports)
    await MLServer(settings).start([ModelSettings(name="small", implementation=Net)])


asyncio.run(main())
