"""LitServe takes JSON alone; its faster queue is on."""

import base64
import sys

import litserve
import numpy as np
from net import session


class Net(litserve.LitAPI):
    def setup(self, device):
        self.net = session(sys.argv[1])

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["x"]), np.float32).reshape(1, -1)

    def predict(self, x):
        return self.net.run(None, {"x": x})[0]

    def encode_response(self, output):
        return {"y": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Net(api_path="/infer"), accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error", generate_client_file=False)
