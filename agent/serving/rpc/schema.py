"""The messages of `inference.proto`, made of its compiled description (`inference.binpb`).

They live in a pool of their own: another library of the process that knows the same protocol, such as tritonclient,
registers the same names in the default one.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"


def _load() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    compiled = resources.files("agent.serving.rpc").joinpath("inference.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load()


def message_class(name: str) -> Any:
    """The class of a message, such as `ModelInferRequest`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def methods() -> dict[str, tuple[Any, Any]]:
    """Every method of the service: the classes of its request and of its answer."""
    service = POOL.FindServiceByName(SERVICE)
    return {
        one.name: (message_class(one.input_type.name), message_class(one.output_type.name)) for one in service.methods
    }
