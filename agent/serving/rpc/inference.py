"""ModelInfer as the HTTP side has it: its message becomes the body of a request, and the body of an answer its message.

So what is checked and said is the same by either way. Messages are those of `inference.proto`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from agent.protocol.datatypes import HEADER_LENGTH
from agent.serving.bad_request import BadRequestError
from agent.serving.exchange import Answer
from agent.serving.oip import ID_LIMIT, LONGEST_US
from agent.serving.rpc.schema import message_class
from agent.serving.tensors import DATATYPES, STRINGS_LIMIT, to_binary

TENSORS_LIMIT = 256  # of one request, and outputs that it asks for
DIMENSIONS_LIMIT = 32
TEXT_LIMIT = 1024  # characters of a name
_WHOLE = frozenset({"int64_param", "uint64_param"})
_TEXT = frozenset({"string_param"})
_SCHEDULING = {"priority": _WHOLE, "timeout": _WHOLE}
_PLACE = {"shared_memory_region": _TEXT, "shared_memory_byte_size": _WHOLE, "shared_memory_offset": _WHOLE}
_OUTPUT = _PLACE | {"classification": _WHOLE}
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip

ModelInferResponse = message_class("ModelInferResponse")


def request_body(message: Any, remaining_s: float | None) -> tuple[bytes, int]:
    """A ModelInferRequest as a body with binary tensors, and the length of its JSON part.

    Args:
        message: that came.
        remaining_s: until the client's deadline, in seconds; None where it has none.

    Raises:
        BadRequestError: naming the field.
    """
    if len(message.id) > ID_LIMIT:
        raise BadRequestError(f"id: it may have {ID_LIMIT} characters")
    for field, tensors in (("inputs", message.inputs), ("outputs", message.outputs)):
        if len(tensors) > TENSORS_LIMIT:
            raise BadRequestError(f"{field}: there may be {TENSORS_LIMIT}")
    raws = iter(message.raw_input_contents)
    expected = sum("shared_memory_region" not in one.parameters for one in message.inputs)
    given = len(message.raw_input_contents)
    if given not in {0, expected}:
        raise BadRequestError(
            f"raw_input_contents: there are {given} for {expected} inputs that are not in shared memory"
        )
    inputs, blobs = [], []
    for one in message.inputs:
        tensor, blob = _input(one, raws if given else None)
        inputs.append(tensor)
        blobs += [] if blob is None else [blob]
    header = {
        "id": message.id,
        "parameters": {"binary_data_output": True, **_urgency(message, remaining_s)},
        "inputs": inputs,
        "outputs": [_output(one) for one in message.outputs],
    }
    encoded = msgspec.json.encode(header)
    return b"".join([encoded, *blobs]), len(encoded)


def response_message(answer: Answer) -> Any:
    """The ModelInferResponse of an answer that went well: each output's bytes, none for those in shared memory."""
    length = answer.headers.get(HEADER_LENGTH)
    position = len(answer.body) if length is None else int(length)
    header = msgspec.json.decode(answer.body[:position])
    message = ModelInferResponse(
        model_name=header["model_name"], model_version=header["model_version"], id=header.get("id", "")
    )
    for one in header["outputs"]:
        output = message.outputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        said = one.get("parameters", {})
        size = said.get("binary_data_size", 0)
        message.raw_output_contents.append(answer.body[position : position + size])
        position += size
        for name in _PLACE.keys() & said.keys():
            kind = "string_param" if _PLACE[name] is _TEXT else "int64_param"
            setattr(output.parameters[name], kind, said[name])
    return message


def _urgency(message: Any, remaining_s: float | None) -> dict[str, Any]:
    """Priority, and how long it may wait: until the deadline, or for less where it says so."""
    said = _parameters("parameters", message.parameters, _SCHEDULING)
    timeout_us = said.get("timeout") or 0
    if remaining_s is not None and 0 <= timeout_us <= LONGEST_US:
        left_us = min(max(int(remaining_s * 1e6), 1), LONGEST_US)
        said["timeout"] = min(left_us, timeout_us or left_us)
    return said


def _parameters(what: str, given: Any, kinds: dict[str, frozenset[str]]) -> dict[str, Any]:
    """Those parameters that mean something here, which have to be of their kind."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in given:
            continue
        choice = given[name].WhichOneof("parameter_choice")
        if choice not in kind:
            raise BadRequestError(f"{what}: {name} is given by {choice}, and is taken by {' or '.join(sorted(kind))}")
        found[name] = getattr(given[name], choice)
    return found


def _name(field: str, name: str) -> str:
    if len(name) > TEXT_LIMIT:
        raise BadRequestError(f"{field}: a name may have {TEXT_LIMIT} characters")
    return name


def _input(tensor: Any, raws: Any) -> tuple[dict[str, Any], bytes | None]:
    """An input's part of the JSON, and its bytes: none of one in shared memory."""
    name = _name("inputs", tensor.name)
    if len(tensor.shape) > DIMENSIONS_LIMIT:
        raise BadRequestError(f"input {name[:100]!r}: a shape may have {DIMENSIONS_LIMIT} dimensions")
    parameters = _parameters(f"input {name[:100]!r}", tensor.parameters, _PLACE)
    blob, shared = _typed(tensor, name[:100]), "shared_memory_region" in tensor.parameters
    if (blob is not None) + (raws is not None and not shared) + shared != 1:
        raise BadRequestError(
            f"input {name[:100]!r}: its data comes by one of contents, raw_input_contents and shared_memory_region"
        )
    if raws is not None and not shared:
        blob = next(raws)
    if blob is not None:
        parameters["binary_data_size"] = len(blob)
    said = {"name": name, "datatype": _name("datatype", tensor.datatype), "shape": list(tensor.shape)}
    return said | {"parameters": parameters}, blob


def _typed(tensor: Any, name: str) -> bytes | None:
    """The bytes of the values in `contents`; None where it has none."""
    given = [field.name for field, _ in tensor.contents.ListFields()]
    if not given:
        return None
    taken = _CONTENTS.get(tensor.datatype)
    if given != [taken]:
        where = "raw_input_contents" if taken is None else f"contents.{taken}"
        raise BadRequestError(f"input {name!r}: contents.{given[0]} can't hold {tensor.datatype[:100]!r}: use {where}")
    values, dtype = getattr(tensor.contents, given[0]), DATATYPES[tensor.datatype]
    if tensor.datatype == "BYTES":
        return _lengths_and_bytes(values, name)
    array = np.array(values, np.dtype(dtype) if given[0] not in {"int_contents", "uint_contents"} else np.int64)
    if array.dtype != dtype:
        info = np.iinfo(dtype)
        if array.min() < info.min or array.max() > info.max:
            raise BadRequestError(f"input {name!r}: contents.{given[0]}: {tensor.datatype} is {info.min} to {info.max}")
    return to_binary(array.astype(dtype))


def _lengths_and_bytes(values: Any, name: str) -> bytes:
    if len(values) > STRINGS_LIMIT:
        raise BadRequestError(f"input {name!r}: a tensor may have {STRINGS_LIMIT} strings")
    return b"".join(part for text in values for part in (len(text).to_bytes(4, "little"), text))


def _output(tensor: Any) -> dict[str, Any]:
    name = _name("outputs", tensor.name)
    return {"name": name, "parameters": _parameters(f"output {name[:100]!r}", tensor.parameters, _OUTPUT)}
