"""FastAPI under uvicorn, raw bytes in and out, no thread hop: as fast as it is usually written."""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from net import session

net = session(sys.argv[1])
app = FastAPI()


@app.post("/infer")
async def infer(request: Request) -> Response:
    row = np.frombuffer(await request.body(), np.float32).reshape(1, -1)
    return Response(net.run(None, {"x": row})[0].tobytes())


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
