"""The declaration of pre- and post-processing: what is taken, and what is refused with which field and remedy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec, manifest_bytes
from agent.protocol.processing_rules import ProcessingError, check, read, schema, used_outputs

IMAGE = (TensorSpec("image", "float32", (-1, 3, 224, 224)),)
SCORES = (TensorSpec("scores", "float32", (-1, 3)),)
TWO = (*SCORES, TensorSpec("b", "float32", (-1, 3)))
CLASSES = {"kind": "classification"}
YOLO = (TensorSpec("output0", "float32", (1, 84, 8400)),)
PARTS = (
    TensorSpec("boxes", "float32", (1, 100, 4)),
    TensorSpec("scores", "float32", (1, 100)),
    TensorSpec("classes", "int64", (1, 100)),
)


def image(**fields: Any) -> dict[str, Any]:
    return {"image": {"size": [224, 224], **fields}}


def yolo(**fields: Any) -> dict[str, Any]:
    part = {"output": "output0", "transposed": True}
    boxes, scores = {**part, "columns": [0, 4]}, {**part, "columns": [4, 84]}
    return {**image(), "answer": {"kind": "detection", "boxes": boxes, "scores": scores, **fields}}


def parts(**fields: Any) -> dict[str, Any]:
    named = {field: {"output": field} for field in ("boxes", "scores", "classes")}
    return {**image(), "answer": {"kind": "detection", **named, **fields}}


@pytest.mark.parametrize(
    ("value", "outputs", "labels"),
    [
        (image(), SCORES, ()),
        (image(resize="center-crop", shorter_side=256, mean=[0.5, 0.5, 0.5], std=[0.2]), SCORES, ()),
        ({**image(), "answer": {"kind": "classification", "activation": "softmax"}}, SCORES, ("a", "b", "c")),
        (yolo(format="cxcywh"), YOLO, tuple(map(str, range(80)))),
        (parts(overlap=None, format="yxyx", coordinates="relative"), PARTS, ("only",)),
    ],
)
def test_what_fits_is_taken_and_survives_its_own_json(value: Any, outputs: Any, labels: Any) -> None:
    taken = read(value)
    check(taken, IMAGE, outputs, len(labels))
    assert read(msgspec.json.decode(msgspec.json.encode(taken))) == taken


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        ({}, "processing", "missing required field `image`"),
        ([], "processing", "Expected `object`"),
        (image(sise=3), "processing.image.sise", "no such field"),
        (image(size=[0, 224]), "processing.image.size[0]", ">= 1"),
        (image(size=[224, 5000]), "processing.image.size[1]", "<= 4096"),
        (image(scale=float("nan")), "processing.image.scale", "Expected `float`"),
        (image(std=[0]), "processing.image.std[0]", "> 0"),
        (image(mean=[1, 2]), "processing.image.mean", "rgb has 3"),
        (image(colors="grey", mean=[1, 2, 3]), "processing.image.mean", "grey has 1"),
        (image(shorter_side=256), "processing.image.shorter_side", "center-crop"),
        (image(resize="center-crop", shorter_side=100), "processing.image.shorter_side", "at least 224"),
        (image(interpolation="lanczos"), "processing.image.interpolation", "lanczos"),
        ({**image(), "answer": {"kind": "pose"}}, "processing.answer.kind", "pose"),
        ({**image(), "answer": {"kind": "classification", "top_k": 0}}, "processing.answer.top_k", ">= 1"),
        (yolo(boxes={"output": "output0", "columns": [0, 5]}), "processing.answer.boxes.columns", "5 columns: 4"),
        (yolo(scores={"output": "output0", "columns": [9, 4]}), "processing.answer.scores.columns", "one a class"),
        (yolo(overlap=1.5), "processing.answer.overlap", "<= 1"),
        (yolo(threshold=float("nan")), "processing.answer.threshold", "Expected `float`"),
        (parts(activation="softmax"), "processing.answer.activation", "gives but one"),
    ],
)
def test_what_makes_no_sense_names_its_field(value: Any, field: str, said: str) -> None:
    with pytest.raises(ProcessingError) as caught:
        read(value)
    assert caught.value.field == field
    assert said in caught.value.detail
    assert caught.value.detail.startswith(f"{field}: ")


BYTE = (TensorSpec("image", "uint8", (1, 224, 224, 3)),)


@pytest.mark.parametrize(
    ("value", "inputs", "outputs", "labels", "field", "said"),
    [
        (image(input="x"), IMAGE, SCORES, (), "processing.image.input", "but image"),
        (image(), IMAGE * 2, SCORES, (), "processing.image", "2 inputs"),
        (image(), (TensorSpec("t", "bool", (1, 3, 224, 224)),), SCORES, (), "processing.image.input", "bool"),
        (image(layout="nhwc"), IMAGE, SCORES, (), "processing.image.size", "[any, 3, 224, 224]"),
        (image(colors="grey"), IMAGE, SCORES, (), "processing.image.size", "[1, 1, 224, 224]"),
        (image(layout="nhwc"), BYTE, SCORES, (), "processing.image.scale", "write scale: 1"),
        ({**image(), "answer": {"kind": "classification", "output": "x"}}, IMAGE, SCORES, (),
         "processing.answer.output", "but scores"),
        ({**image(), "answer": {**CLASSES, "output": "b"}}, IMAGE, TWO, (),
         "processing.answer.output", "export 'b' first"),
        ({**image(), "answer": CLASSES}, IMAGE, (TensorSpec("p", "float32", (-1, 1)),), (),
         "processing.answer.output", "two classes"),
        ({**image(), "answer": CLASSES}, IMAGE, SCORES, ("a",), "labels", "1 names for 3"),
        ({**image(), "answer": CLASSES}, IMAGE, (TensorSpec("a", "float32", (-1, 3)), *PARTS[:1]), (),
         "processing.answer", "'boxes'"),
        (parts(), IMAGE, (TensorSpec("boxes", "float32", (1, 50, 4)), *PARTS[1:]), (),
         "processing.answer", "different numbers"),
        (yolo(scores={"output": "output0", "columns": [4, 85], "transposed": True}), IMAGE, YOLO, (),
         "processing.answer.scores.columns", "has 84 columns"),
        (yolo(), IMAGE, YOLO, ("a",), "labels", "1 names for 80"),
        (yolo(background=80), IMAGE, YOLO, (), "processing.answer.background", "0 to 79"),
        (yolo(boxes={"output": "no"}), IMAGE, YOLO, (), "processing.answer.boxes.output", "but output0"),
        (parts(scores={"output": "boxes"}), IMAGE, PARTS, (), "processing.answer.scores.columns", "one column"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_names_field_and_remedy(
    value: Any, inputs: Any, outputs: Any, labels: Any, field: str, said: str
) -> None:
    with pytest.raises(ProcessingError) as caught:
        check(read(value), inputs, outputs, len(labels))
    assert caught.value.field == field
    assert said in caught.value.detail


def test_the_answer_names_the_outputs_that_it_is_made_of() -> None:
    assert used_outputs(read(image()), SCORES) == set()
    assert used_outputs(read({**image(), "answer": CLASSES}), SCORES) == {"scores"}
    assert used_outputs(read(parts()), PARTS) == {"boxes", "scores", "classes"}


def test_the_schema_takes_what_is_read_and_stands_alone() -> None:
    found = schema()
    assert "$ref" not in msgspec.json.encode(found).decode()
    assert found["properties"]["image"]["properties"]["size"]["minItems"] == 2


def test_an_old_manifest_has_no_processing_and_a_new_one_keeps_it() -> None:
    plain = Manifest(
        "a" * 64, 10, 4, "tri", "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32, IMAGE, SCORES
    )
    old = msgspec.json.decode(manifest_bytes(plain))
    del old["processing"]
    assert msgspec.convert(old, Manifest) == plain
    new = msgspec.structs.replace(plain, processing=read(image()))
    again = msgspec.json.decode(manifest_bytes(new), type=Manifest)
    assert again == new
