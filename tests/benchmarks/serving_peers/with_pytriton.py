"""PyTriton: Triton itself, with its dynamic batching; the extension for binary tensors."""

import sys

import numpy as np
from net import session
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

net = session(sys.argv[1])
(output,) = net.get_outputs()
port = int(sys.argv[2])


@batch
def infer(x):
    return {output.name: net.run(None, {"x": x})[0]}


ports = TritonConfig(http_address="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2)
with Triton(config=ports) as triton:
    features = net.get_inputs()[0].shape[1]
    triton.bind(
        "small",
        infer,
        inputs=[Tensor(name="x", dtype=np.float32, shape=(features,))],
        outputs=[Tensor(name=output.name, dtype=np.float32, shape=(-1,))],
        config=ModelConfig(max_batch_size=32),
    )
    triton.serve()
