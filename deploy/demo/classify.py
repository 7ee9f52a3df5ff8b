"""A program on a device: sends images to the local inference API, and tells it afterwards what they truly were.

Plain HTTP in the Open Inference Protocol v2 with binary tensors, so that it can be read as an example.
"""

from __future__ import annotations

import json

import httpx
import numpy as np


def classify(url: str, model: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Classify images one at a time, then post the true labels as feedback.

    Args:
        url: of the device's local inference API.
        model: its name.
        images: (N, …) float32, as the model takes them.
        labels: (N,) class indices.
    """
    with httpx.Client(base_url=url, timeout=30) as client:
        name = client.get(f"/v2/models/{model}").raise_for_status().json()["inputs"][0]["name"]
        for index, image in enumerate(images):
            _infer(client, model, name, str(index), image[None])
        for start in range(0, len(labels), 500):
            said = [{"id": str(i), "label": int(labels[i])} for i in range(start, min(start + 500, len(labels)))]
            client.post(f"/v2/models/{model}/feedback", json={"labels": said}).raise_for_status()


def _infer(client: httpx.Client, model: str, name: str, request_id: str, tensor: np.ndarray) -> None:
    raw = np.ascontiguousarray(tensor, dtype="<f4").tobytes()
    header = json.dumps(
        {
            "id": request_id,
            "inputs": [
                {
                    "name": name,
                    "datatype": "FP32",
                    "shape": list(tensor.shape),
                    "parameters": {"binary_data_size": len(raw)},
                }
            ],
        }
    ).encode()
    answer = client.post(
        f"/v2/models/{model}/infer",
        content=header + raw,
        headers={"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))},
    )
    answer.raise_for_status()
