"""The declaration of pre- and post-processing: how an image becomes a model's input, and its outputs an answer.

It is pushed with a version, checked against the model's tensors, and is a part of every variant's signed manifest.
Shapes and axes in it are those of the version's source: a converter may have changed them in its file. What is declared
is carried out by `agent.processing`, on devices and where variants are measured; whether it makes sense is said by
`agent.protocol.processing_rules`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

SIDE_LIMIT = 4096  # pixels of a side of what a model takes
CHANNELS = {"rgb": 3, "bgr": 3, "grey": 1}
ANSWER = ("boxes", "classes", "labels", "scores")  # outputs of an answer

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Side = Annotated[int, msgspec.Meta(ge=1, le=SIDE_LIMIT)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Offset = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Column = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Resize(StrEnum):
    """How an image of any size gets the size that a model takes."""

    STRETCH = "stretch"  # both sides independently
    LETTERBOX = "letterbox"  # as large as fits, and the rest filled
    CENTER_CROP = "center-crop"  # its shorter side to `shorter_side`, then the middle


class Interpolation(StrEnum):
    """How pixels between pixels are found; `bilinear` and `bicubic` average over what a pixel covers (`antialias`)."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Colors(StrEnum):
    """What the channels are."""

    RGB = "rgb"
    BGR = "bgr"
    GREY = "grey"


class Layout(StrEnum):
    """The order of an input's axes: rows, channels, height, width."""

    NCHW = "nchw"
    NHWC = "nhwc"


class Align(StrEnum):
    """Where a letterboxed image lies."""

    CENTER = "center"
    TOP_LEFT = "top-left"


class Activation(StrEnum):
    """What is done to scores first."""

    NONE = "none"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class BoxFormat(StrEnum):
    """What the four numbers of a box are: corners, or a corner or the centre with width and height."""

    XYXY = "xyxy"
    YXYX = "yxyx"
    XYWH = "xywh"
    CXCYWH = "cxcywh"


class Coordinates(StrEnum):
    """In what boxes are given: pixels of the model's input, or shares of its sides."""

    PIXELS = "pixels"
    RELATIVE = "relative"


class ImageStep(msgspec.Struct, frozen=True):
    """An image becomes one row of an input: decoded, turned upright, resized, and each channel normalized.

    A value is `(pixel × scale - mean) / std`, with pixels from 0 to 255. Where the input holds whole numbers it is
    rounded, and clipped to what they hold.

    Attributes:
        size: height and width in pixels that the model takes.
        input: its name; may be left out where the model has one.
        resize: how the image gets that size.
        interpolation: of the resizing.
        antialias: whether a smaller image's pixels are averages of what they cover, as in Pillow; without it only
            the nearest pixels count, as in OpenCV.
        shorter_side: of `center-crop`: pixels that the image's shorter side gets before its middle is taken; None
            is the larger side of `size`.
        align: of `letterbox`: where the image lies.
        fill: of `letterbox`: red, green and blue of what the image does not cover.
        colors: the channels in their order.
        layout: the order of the input's axes.
        scale: that pixels are multiplied by.
        mean: that is then subtracted: one number a channel, or one for all.
        std: that it is then divided by: one number a channel, or one for all.
    """

    size: tuple[Side, Side]
    input: Name | None = None
    resize: Resize = Resize.STRETCH
    interpolation: Interpolation = Interpolation.BILINEAR
    antialias: bool = True
    shorter_side: Side | None = None
    align: Align = Align.CENTER
    fill: tuple[Byte, Byte, Byte] = (114, 114, 114)
    colors: Colors = Colors.RGB
    layout: Layout = Layout.NCHW
    scale: Factor = 1 / 255
    mean: Annotated[tuple[Offset, ...], msgspec.Meta(min_length=1, max_length=3)] = (0.0,)
    std: Annotated[tuple[Factor, ...], msgspec.Meta(min_length=1, max_length=3)] = (1.0,)


class Classification(msgspec.Struct, frozen=True, tag_field="kind", tag="classification"):
    """An output of one score a class becomes the best classes: `scores`, `classes`, and `labels` where there are names.

    Attributes:
        output: its name; the model's first, by which accuracy is measured too.
        activation: what makes the scores probabilities; the order is that of the output.
        top_k: how many classes at most.
        threshold: least score, after the activation.
    """

    output: Name | None = None
    activation: Activation = Activation.NONE
    top_k: Count = 5
    threshold: Offset | None = None


class Columns(msgspec.Struct, frozen=True):
    """Numbers for each box in an output of shape (1, boxes, columns) or (boxes, columns).

    Attributes:
        output: its name.
        columns: the first, and the one after the last; None takes all.
        transposed: whether the columns come before the boxes, as in (1, 84, 8400).
    """

    output: Name
    columns: tuple[Column, Column] | None = None
    transposed: bool = False


class Detection(msgspec.Struct, frozen=True, tag_field="kind", tag="detection"):
    """Outputs of boxes become those that were found: `boxes`, `scores`, `classes`, and `labels` where there are names.

    Every box has the class of its largest score. Of boxes that overlap the best one stays (non-maximum suppression).
    `boxes` are left, top, right and bottom in pixels of the image that was posted, turned upright.

    Attributes:
        boxes: four columns.
        scores: one column a class; one column where `classes` gives the class.
        classes: one column with the class's index; None where `scores` has one column a class.
        objectness: one column that every score of a box is multiplied by; None for none.
        format: of a box.
        coordinates: of a box.
        activation: of scores and objectness; `softmax` is of the scores alone.
        background: class that is no object; None for none.
        threshold: least score.
        overlap: least intersection over union at which the weaker of two boxes goes; None keeps both, as where the
            model does that itself.
        across_classes: whether boxes of different classes suppress each other too.
        max_boxes: how many boxes at most, the best.
    """

    boxes: Columns
    scores: Columns
    classes: Columns | None = None
    objectness: Columns | None = None
    format: BoxFormat = BoxFormat.XYXY
    coordinates: Coordinates = Coordinates.PIXELS
    activation: Activation = Activation.NONE
    background: Column | None = None
    threshold: Share = 0.25
    overlap: Share | None = 0.45
    across_classes: bool = False
    max_boxes: Count = 100

    @property
    def parts(self) -> dict[str, Columns]:
        """What it reads, by field."""
        parts = {"boxes": self.boxes, "scores": self.scores, "classes": self.classes, "objectness": self.objectness}
        return {field: part for field, part in parts.items() if part is not None}


class Processing(msgspec.Struct, frozen=True):
    """What is done around a model, so that an image can be posted and an answer comes back.

    Attributes:
        image: how an image becomes the model's input.
        answer: what becomes of its outputs; None sends them as they are, and so it is with outputs that it does not
            name.
    """

    image: ImageStep
    answer: Classification | Detection | None = None
