"""Whether a declaration of pre- and post-processing makes sense, and fits a model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from agent.protocol.processing import (
    ANSWER,
    CHANNELS,
    Activation,
    Classification,
    Columns,
    Detection,
    ImageStep,
    Layout,
    Processing,
    Resize,
)

INPUT_ELEMENTS = 1 << 26  # numbers of one input
_WHOLE_NUMBERS = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"}
_TAKEN = _WHOLE_NUMBERS | {"float16", "float32", "float64"}


class Tensor(Protocol):
    """What of a tensor a declaration is checked against: its name, numpy dtype, and shape with -1 for a free size."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


TensorT = TypeVar("TensorT", bound=Tensor)


class ProcessingError(Exception):
    """A declaration makes no sense, or does not fit its model.

    Attributes:
        field: at fault, such as `processing.image.size`.
        detail: what is wrong with it, and the remedy; it begins with the field.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = f"{field}: {detail}"


def read(value: Any) -> Processing:
    """A declaration as its JSON's or YAML's plain values; an unknown field is an error, most likely a misspelt one.

    Raises:
        ProcessingError: naming the field.
    """
    try:
        taken = msgspec.convert(value, Processing)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at `$")
        raise ProcessingError(f"processing{path.rstrip('`')}", said) from None
    unknown = _unknown(value, msgspec.to_builtins(taken), "processing")
    if unknown:
        raise ProcessingError(unknown, "there is no such field: see `shoal model processing-schema`")
    _check_alone(taken)
    return taken


def _unknown(given: Any, taken: Any, path: str) -> str | None:
    if not isinstance(given, dict) or not isinstance(taken, dict):
        return None
    for key, value in given.items():
        place = f"{path}.{key}"
        if key not in taken:
            return place
        found = _unknown(value, taken[key], place)
        if found:
            return found
    return None


def _check_alone(processing: Processing) -> None:
    """What can be told without the model."""
    image, answer = processing.image, processing.answer
    channels = CHANNELS[image.colors.value]
    for name in ("mean", "std"):
        count = len(getattr(image, name))
        if count not in {1, channels}:
            raise ProcessingError(
                f"processing.image.{name}",
                f"it has {count} numbers, and {image.colors.value} has {channels}: one a channel",
            )
    if image.shorter_side is not None:
        if image.resize is not Resize.CENTER_CROP:
            raise ProcessingError("processing.image.shorter_side", "it is for resize: center-crop; leave it out")
        if image.shorter_side < max(image.size):
            raise ProcessingError(
                "processing.image.shorter_side",
                f"{image.shorter_side} does not cover size {list(image.size)}: at least {max(image.size)}",
            )
    if isinstance(answer, Detection):
        _check_columns(answer)


def _check_columns(answer: Detection) -> None:
    for field, part in answer.parts.items():
        if part.columns is not None:
            first, end = part.columns
            wanted = {"boxes": 4, "classes": 1, "objectness": 1}.get(field)
            if field == "scores" and answer.classes is not None:
                wanted = 1
            if end <= first or (wanted is not None and end - first != wanted):
                raise ProcessingError(
                    f"processing.answer.{field}.columns",
                    f"[{first}, {end}] is {end - first} columns: "
                    f"{wanted or 'one a class'}, as the first and the one after the last",
                )
    if answer.classes is not None and answer.activation is Activation.SOFTMAX:
        raise ProcessingError(
            "processing.answer.activation", "softmax is over the scores of all classes, and `classes` gives but one"
        )


def check(processing: Processing, inputs: Sequence[Tensor], outputs: Sequence[Tensor], labels: int = 0) -> None:
    """Whether a declaration fits a model.

    Args:
        processing: the declaration.
        inputs: of the model.
        outputs: of the model.
        labels: how many class names there are; 0 for none.

    Raises:
        ProcessingError: naming the field and the remedy.
    """
    _check_alone(processing)
    _check_image(processing.image, inputs)
    if isinstance(processing.answer, Classification):
        _check_classification(processing.answer, outputs, labels)
    elif isinstance(processing.answer, Detection):
        _check_detection(processing.answer, outputs, labels)
    named = {spec.name for spec in outputs} - used_outputs(processing, outputs)
    clash = sorted(named & set(ANSWER)) if processing.answer is not None else []
    if clash:
        raise ProcessingError(
            "processing.answer", f"the model's output {clash[0]!r} would be called as a part of the answer: rename it"
        )


def image_input(image: ImageStep, inputs: Sequence[TensorT]) -> TensorT:
    """The input that gets the image."""
    return next((spec for spec in inputs if spec.name == image.input), inputs[0])


def used_outputs(processing: Processing, outputs: Sequence[Tensor]) -> set[str]:
    """Names of the outputs that the answer is made of."""
    answer = processing.answer
    if isinstance(answer, Detection):
        return {part.output for part in answer.parts.values()}
    return {answer.output or outputs[0].name} if answer is not None else set()


def _check_image(image: ImageStep, inputs: Sequence[Tensor]) -> None:
    names = ", ".join(spec.name for spec in inputs)
    if image.input is not None and image.input not in {spec.name for spec in inputs}:
        raise ProcessingError("processing.image.input", f"the model has no input {image.input!r}, but {names}")
    if len(inputs) != 1:
        raise ProcessingError(
            "processing.image", f"the model takes {len(inputs)} inputs ({names}), and an image makes one: give tensors"
        )
    spec = image_input(image, inputs)
    if spec.dtype not in _TAKEN:
        raise ProcessingError("processing.image.input", f"{spec.name!r} takes {spec.dtype}, which holds no pixels")
    channels = CHANNELS[image.colors.value]
    height, width = image.size
    sizes = (1, channels, height, width) if image.layout is Layout.NCHW else (1, height, width, channels)
    if len(spec.shape) != 4 or any(size not in {-1, wanted} for size, wanted in zip(spec.shape, sizes, strict=True)):
        free = str(["any" if size < 0 else size for size in spec.shape]).replace("'any'", "any")
        raise ProcessingError(
            "processing.image.size",
            f"{spec.name!r} takes {free}, and size, colors and layout make {list(sizes)}: set them to what it takes",
        )
    if channels * height * width > INPUT_ELEMENTS:
        raise ProcessingError("processing.image.size", f"it makes more than {INPUT_ELEMENTS} numbers: take less")
    if spec.dtype in _WHOLE_NUMBERS and 255 * image.scale <= min(image.std):
        raise ProcessingError(
            "processing.image.scale",
            f"{spec.name!r} takes {spec.dtype}, and pixels would all be 0 or 1 in it: write scale: 1",
        )


def _check_classification(answer: Classification, outputs: Sequence[Tensor], labels: int) -> None:
    spec = _output(answer.output or outputs[0].name, outputs, "processing.answer.output")
    if spec.name != outputs[0].name:
        raise ProcessingError(
            "processing.answer.output",
            f"accuracy and feedback go by the model's first output, {outputs[0].name!r}: export {spec.name!r} first",
        )
    if len(spec.shape) < 2 or spec.shape[0] not in {-1, 1}:
        raise ProcessingError("processing.answer.output", f"{spec.name!r} has no axis of classes: {list(spec.shape)}")
    classes = 1
    for size in spec.shape[1:]:
        classes = -1 if size < 0 or classes < 0 else classes * size
    if classes == 1:
        raise ProcessingError("processing.answer.output", f"{spec.name!r} has one score: two classes at least")
    _check_labels(classes, labels)


def _check_detection(answer: Detection, outputs: Sequence[Tensor], labels: int) -> None:
    batched = len(_output(answer.boxes.output, outputs, "processing.answer.boxes.output").shape) == 3
    counts: dict[str, int] = {}
    for field, part in answer.parts.items():
        count, columns = _table(field, part, outputs, batched=batched)
        if part.columns is not None:
            columns = part.columns[1] - part.columns[0]
        elif field != "scores" and columns not in {-1, 4 if field == "boxes" else 1}:
            raise ProcessingError(
                f"processing.answer.{field}.columns",
                f"{part.output!r} has {columns} columns: say which ones are the {field}",
            )
        if field == "scores" and columns >= 0:
            _check_scores(answer, columns, labels)
        if count >= 0:
            counts[field] = count
    if len(set(counts.values())) > 1:
        raise ProcessingError("processing.answer", f"its parts are of different numbers of boxes: {counts}")


def _table(field: str, part: Columns, outputs: Sequence[Tensor], *, batched: bool) -> tuple[int, int]:
    """Boxes and columns that an output has, -1 where that is free."""
    place = f"processing.answer.{field}"
    spec = _output(part.output, outputs, f"{place}.output")
    shape = list(spec.shape)
    if batched:
        if shape[:1] not in ([1], [-1]):
            raise ProcessingError(f"{place}.output", f"{spec.name!r} has no first axis of 1: {list(spec.shape)}")
        shape = shape[1:]
    single = field != "boxes" and len(shape) == 1 and not part.transposed
    if len(shape) != 2 and not single:
        raise ProcessingError(
            f"{place}.output", f"{spec.name!r} is {list(spec.shape)}, and not (1, boxes, columns) or (boxes, columns)"
        )
    if single:
        shape = [*shape, 1]
    count, columns = reversed(shape) if part.transposed else shape
    if part.columns is not None and 0 <= columns < part.columns[1]:
        raise ProcessingError(
            f"{place}.columns", f"{spec.name!r} has {columns} columns in {list(spec.shape)}: is it transposed?"
        )
    return count, columns


def _check_scores(answer: Detection, classes: int, labels: int) -> None:
    if answer.classes is not None:
        if classes != 1:
            raise ProcessingError(
                "processing.answer.scores.columns", f"{classes} columns, and `classes` gives the class: one column"
            )
        return
    if answer.background is not None and answer.background >= classes:
        raise ProcessingError("processing.answer.background", f"there are {classes} classes: 0 to {classes - 1}")
    _check_labels(classes, labels)


def _check_labels(classes: int, labels: int) -> None:
    if labels and 0 <= classes != labels:
        raise ProcessingError("labels", f"there are {labels} names for {classes} classes: one for each, or none")


def _output(name: str, outputs: Sequence[Tensor], field: str) -> Tensor:
    found = next((spec for spec in outputs if spec.name == name), None)
    if found is None:
        names = ", ".join(spec.name for spec in outputs)
        raise ProcessingError(field, f"the model has no output {name!r}, but {names}")
    return found


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a declaration, without references into other documents."""
    (found,), components = msgspec.json.schema_components([Processing], ref_template="#/$defs/{name}")
    whole = _inlined(found, components)
    assert isinstance(whole, dict)
    return whole


def _inlined(part: Any, components: dict[str, Any]) -> Any:
    """A schema with what it refers to in its place: no type of it holds itself."""
    if isinstance(part, list):
        return [_inlined(one, components) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(components[part["$ref"].rsplit("/", 1)[1]], components)
    whole = {key: _inlined(value, components) for key, value in part.items() if key != "discriminator"}
    if whole.get("type") == "object":
        whole["additionalProperties"] = False  # `read` refuses what it does not know
    return whole
