"""Looks at a message before it is decoded: what is made of one may take many times the memory it takes on the way.

Raw tensors take as much as they do on the way. All else is bounded: the fields of the message, counted without decoding
them, and the bytes of those that are no raw tensors.
"""

from __future__ import annotations

from agent.serving.bad_request import BadRequestError

UNSEEN = 64 << 10  # bytes of a message of which nothing large can be made
FIELDS_LIMIT = 1024
DECODED_LIMIT = 8 << 20  # bytes of a message without its raw tensors
_RAW = 7  # raw_input_contents of ModelInferRequest
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def check(message: bytes) -> None:
    """Refuse a ModelInferRequest that would take much more memory than it has bytes.

    Raises:
        BadRequestError: then, and for what is no message.
    """
    if len(message) <= UNSEEN:
        return
    position, fields, decoded = 0, 0, 0
    while position < len(message):
        began = position
        tag, position = _varint(message, position)
        match tag & 7:
            case wire_type if wire_type == _VARINT:
                _, position = _varint(message, position)
            case wire_type if wire_type == _LENGTH:
                size, position = _varint(message, position)
                position += size
            case wire_type if wire_type in {_FIXED32, _FIXED64}:
                position += 4 if wire_type == _FIXED32 else 8
            case _:
                raise malformed()
        fields += 1
        decoded += 0 if tag >> 3 == _RAW else position - began
        if fields > FIELDS_LIMIT:
            raise BadRequestError(f"the message has more than {FIELDS_LIMIT} fields")
        if decoded > DECODED_LIMIT:
            raise BadRequestError(
                f"the message has more than {DECODED_LIMIT} bytes beside raw_input_contents: send tensors there"
            )
    if position != len(message):
        raise malformed()


def malformed() -> BadRequestError:
    """What is said of bytes that are no message."""
    return BadRequestError("the message is no protocol buffer of this method's request")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for index, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise malformed()
