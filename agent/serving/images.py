"""Images that are posted to a model whose version declares how: to tensors and back to answers. It knows no HTTP.

Decoding, resizing and what is made of the outputs take a few milliseconds to tenths of a second, and have threads of
their own: other requests are answered meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from agent.processing.classify import classify
from agent.processing.decode import FORMATS, NoDecoderError, decode
from agent.processing.detect import AnswerError, detect
from agent.processing.image import Geometry, ImageError, to_row
from agent.protocol.manifest import Manifest
from agent.protocol.processing import Classification, Detection, Processing
from agent.protocol.processing_rules import image_input, used_outputs
from agent.runtimes.base import Array, Tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.tensors import datatype
from agent.serving.waiting import DEFAULT, QueueFullError

THREADS = 2
WAITING = 32  # images that are decoded or wait for it: each may take a hundred megabytes while it is
ResultT = TypeVar("ResultT")


class UnusableImageError(BadRequestError):
    """An image that can't be taken, with the status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnusableAnswerError(Exception):
    """The model answered what its version's declaration does not describe."""


@dataclass(frozen=True)
class ImageRequest:
    """A decoded image: one row of the model's input, and where the image lies in it.

    Attributes:
        request_id: the client's.
        inputs: by name.
        geometry: where the image lies in the row.
        priority: as that of a request with tensors; clients who post an image say nothing of it.
        timeout_s: likewise.
    """

    request_id: str
    inputs: Tensors
    geometry: Geometry
    priority: int = DEFAULT
    timeout_s: float = 0.0


def is_image(content_type: str) -> bool:
    """Whether a body is said to be an image."""
    return content_type.strip().lower().startswith("image/")


def described(manifest: Manifest) -> dict[str, Any]:
    """What a model's metadata say of images; nothing where it takes none."""
    if manifest.processing is None:
        return {}
    return {"parameters": {"image_content_types": list(FORMATS), "image_outputs": _names(manifest)}}


class Images:
    """Threads that decode, and make answers."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="image")
        self._waiting = 0

    async def read(self, body: bytes, content_type: str, request_id: str, manifest: Manifest) -> ImageRequest:
        """An image as the input of a model.

        Raises:
            UnusableImageError: 415 where the model or the format takes no image, 501 without a decoder, 400 for one
                that is damaged or too large.
            QueueFullError: when too many wait.
        """
        media_type = content_type.partition(";")[0].strip().lower()
        if manifest.processing is None:
            said = f"{manifest.model}@{manifest.version} takes tensors alone: it was pushed without --processing"
            raise UnusableImageError(415, said)
        if media_type not in FORMATS:
            raise UnusableImageError(415, f"{media_type[:100]} is not taken, but {', '.join(FORMATS)}")
        if self._waiting >= WAITING:
            raise QueueFullError
        processing = manifest.processing
        return await self._do(lambda: _read(body, FORMATS[media_type], request_id, manifest, processing))

    async def answer(self, wanted: ImageRequest, outputs: Tensors, manifest: Manifest) -> bytes:
        """The body of an answer.

        Raises:
            UnusableAnswerError: when the outputs are not as the declaration says.
        """
        return await self._do(lambda: _encoded(wanted, outputs, manifest))

    async def _do(self, work: Callable[[], ResultT]) -> ResultT:
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def _read(body: bytes, kind: str, request_id: str, manifest: Manifest, processing: Processing) -> ImageRequest:
    spec = image_input(processing.image, manifest.inputs)
    try:
        row, geometry = to_row(decode(body, (kind,)), processing.image, spec.dtype)
    except ImageError as error:
        raise UnusableImageError(400, f"the image can't be taken: {error}") from None
    except NoDecoderError as error:
        raise UnusableImageError(501, str(error)) from None
    return ImageRequest(request_id, {spec.name: row}, geometry)


def _encoded(wanted: ImageRequest, outputs: Tensors, manifest: Manifest) -> bytes:
    answer: dict[str, Any] = {"model_name": manifest.model, "model_version": manifest.version}
    if wanted.request_id:
        answer["id"] = wanted.request_id
    answer["parameters"] = {"image_width": wanted.geometry.width, "image_height": wanted.geometry.height}
    answer["outputs"] = _outputs(wanted, outputs, manifest)
    return msgspec.json.encode(answer)


def _outputs(wanted: ImageRequest, outputs: Tensors, manifest: Manifest) -> list[dict[str, Any]]:
    """The answer's tensors, then those of the model that it is not made of."""
    assert manifest.processing is not None
    declared = manifest.processing.answer
    made: list[tuple[str, Array]] = []
    if isinstance(declared, Classification):
        scores, classes = classify(outputs[declared.output or manifest.outputs[0].name], declared)
        made = [("scores", scores), ("classes", classes)]
    elif isinstance(declared, Detection):
        try:
            found = detect(outputs, declared, manifest.processing.image.size, wanted.geometry)
        except AnswerError as error:
            raise UnusableAnswerError(f"{error}; see `processing` of its version") from None
        made = [("boxes", found.boxes), ("scores", found.scores), ("classes", found.classes)]
    tensors = [_tensor(name, value) for name, value in made]
    if made and manifest.labels:
        classes = dict(made)["classes"]
        tensors.append(
            {
                "name": "labels",
                "datatype": "BYTES",
                "shape": list(classes.shape),
                "data": [_label(int(index), manifest.labels) for index in classes],
            }
        )
    used = used_outputs(manifest.processing, manifest.outputs)
    return tensors + [_tensor(spec.name, outputs[spec.name]) for spec in manifest.outputs if spec.name not in used]


def _names(manifest: Manifest) -> list[str]:
    assert manifest.processing is not None
    used = used_outputs(manifest.processing, manifest.outputs)
    made = {Classification: ["scores", "classes"], Detection: ["boxes", "scores", "classes"]}
    names = made.get(type(manifest.processing.answer), []) if manifest.processing.answer is not None else []
    labels = ["labels"] if names and manifest.labels else []
    return names + labels + [spec.name for spec in manifest.outputs if spec.name not in used]


def _tensor(name: str, value: Array) -> dict[str, Any]:
    array = np.asarray(value)
    return {
        "name": name,
        "datatype": datatype(array.dtype.name),
        "shape": list(array.shape),
        "data": array.reshape(-1).tolist(),
    }


def _label(index: int, labels: tuple[str, ...]) -> str:
    return labels[index] if 0 <= index < len(labels) else ""
