"""The compiled description of the gRPC protocol is that of `inference.proto`; names and numbers are the standard's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from tritonclient.grpc import service_pb2

from agent.serving.rpc import schema
from agent.serving.rpc.calls import METHODS
from agent.serving.rpc.server import ABSENT
from agent.serving.rpc.streams import STREAM

FOLDER = Path(schema.__file__).parent


def test_what_is_compiled_is_what_is_written(tmp_path: Path) -> None:
    made = tmp_path / "inference.binpb"
    assert protoc.main(["protoc", f"-I{FOLDER}", f"--descriptor_set_out={made}", "inference.proto"]) == 0
    new, kept = (
        descriptor_pb2.FileDescriptorSet.FromString(one.read_bytes()) for one in (made, FOLDER / "inference.binpb")
    )
    assert new == kept, (
        "make it anew: .venv/bin/python -m grpc_tools.protoc -Iagent/serving/rpc "
        "--descriptor_set_out=agent/serving/rpc/inference.binpb inference.proto"
    )


def fields(message: Any) -> set[tuple[Any, ...]]:
    return {
        (
            one.name,
            one.number,
            one.type,
            one.is_repeated,
            one.message_type.full_name if one.message_type else "",
            one.containing_oneof.name if one.containing_oneof else "",
        )
        for one in message.fields
    }


def all_messages(messages: Any) -> dict[str, Any]:
    found = {}
    for one in messages:
        found |= {one.full_name: one} | all_messages(one.nested_types)
    return found


def test_every_field_is_as_the_public_client_has_it() -> None:
    """Triton's client has more messages and fields than a device answers with; none that we have is another there."""
    public = service_pb2.DESCRIPTOR
    theirs = all_messages([*public.message_types_by_name.values()])
    for dependency in public.dependencies:
        theirs |= all_messages(dependency.message_types_by_name.values())
    ours = all_messages(schema.POOL.FindFileByName("inference.proto").message_types_by_name.values())
    assert len(ours) > 40
    for name, message in ours.items():
        assert fields(message) <= fields(theirs[name]), name
    kinds = {one.name: one.number for one in schema.POOL.FindEnumTypeByName("inference.DataType").values}
    (config,) = public.dependencies
    assert kinds.items() <= {one.name: one.number for one in config.enum_types_by_name["DataType"].values}.items()


def test_every_method_is_as_the_public_client_has_it() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, (asked, answered) in schema.methods().items():
        assert asked.DESCRIPTOR.full_name == theirs[name].input_type.full_name
        assert answered.DESCRIPTOR.full_name == theirs[name].output_type.full_name
    assert sorted([*METHODS, STREAM]) == sorted(schema.methods())
    assert {*METHODS, STREAM, *ABSENT} == set(theirs), "what is not offered says why"


@pytest.mark.parametrize("name", sorted(schema.methods()))
def test_messages_are_none_of_the_default_pool(name: str) -> None:
    """Where another library knows the same protocol, both go on."""
    asked, _ = schema.methods()[name]
    assert asked.DESCRIPTOR is not service_pb2.DESCRIPTOR.message_types_by_name[asked.DESCRIPTOR.name]
