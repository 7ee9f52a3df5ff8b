"""Bounds of inference requests. Their shapes are those of the Open Inference Protocol v2."""

from __future__ import annotations

REQUEST_BYTES = 64 << 20
ANSWER_BYTES = 64 << 20
MOST_REQUESTS = 8  # at once, on a server
MOST_LANES = 256  # that answer a request
DEFAULT_TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 600.0
EXAMPLE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}]}
EXAMPLE_ANSWER = {
    "model_name": "mnist",
    "model_version": "2",
    "parameters": {
        "took_s": 0.041,
        "reissued": 0,
        "relayed": 0,
        "devices": [{"device": "camera-01", "rows": 2, "left_out": ""}],
    },
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [2, 2], "data": [0.9, 0.1, 0.2, 0.8]}],
}
