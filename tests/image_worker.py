"""A real inference worker with models that take images; nothing of a server or a supervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.processing import (
    Activation,
    BoxFormat,
    Classification,
    Columns,
    Detection,
    ImageStep,
    Processing,
    Resize,
)
from agent.serving.ipc import Collect, Window
from tests.images import COLORS, SIDE, write_box_net, write_color_net
from tests.serving_worker import serve, start_worker

IMAGE = ImageStep(size=(SIDE, SIDE), resize=Resize.CENTER_CROP)
COLOR = Processing(IMAGE, Classification(activation=Activation.SOFTMAX, top_k=2))
BOX = Processing(
    ImageStep(size=(SIDE, SIDE), resize=Resize.LETTERBOX),
    Detection(
        boxes=Columns("output0", (0, 4), transposed=True),
        scores=Columns("output0", (4, 7), transposed=True),
        format=BoxFormat.CXCYWH,
    ),
)


def manifest(name: str, version: str, processing: Processing | None) -> Manifest:
    boxes = name == "boxes"
    inputs = (TensorSpec("image", "float32", (1 if boxes else -1, 3, SIDE, SIDE)),)
    output = TensorSpec("output0", "float32", (1, 7, 3)) if boxes else TensorSpec("scores", "float32", (-1, 3))
    return Manifest(
        version + ("b" if boxes else "c") * 63, 10, 4, name, version, "v", "p", ModelFormat.ONNX,
        RuntimeName.ONNX, Precision.FP32, inputs, (output,), max_batch=1 if boxes else 8, labels=COLORS,
        processing=processing,
    )  # fmt: skip


class Worker:
    """A worker process and its channel."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        started = start_worker(environment=environment)
        self.process, self.channel = started.process, started.channel
        self.client = httpx.Client(base_url=f"{started.url}/v2/models", timeout=30)
        write_color_net(folder / "colors")
        # In the input's pixels, of 16 × 16: the second lies in the first, the third is another class.
        boxes = [[8, 8, 8, 8], [8, 8, 8, 7.5], [12, 6, 4, 4]]
        write_box_net(folder / "boxes", boxes, [[0.9, 0, 0], [0.8, 0, 0], [0, 0, 0.7]])

    def load(self, one: Manifest, *, activate: bool = True) -> None:
        serve(self.channel, one, self.folder / one.model, activate=activate)

    def post(self, model: str, data: bytes, kind: str = "image/jpeg", **headers: str) -> httpx.Response:
        return self.client.post(f"/{model}/infer", content=data, headers={"Content-Type": kind, **headers})

    def windows(self) -> dict[str, Any]:
        self.channel.send(Collect(3))
        window = self.channel.receive()
        assert isinstance(window, Window)
        return {one.version: one for one in window.models}

    def stop(self) -> None:
        self.client.close()
        self.channel.close()
        assert self.process.wait(20) == 0
