"""Queries over devices select, in SQLite and in PostgreSQL, what a plain reading of them selects."""

from __future__ import annotations

import fnmatch
import random
import re
from typing import Any

import msgspec
import pytest
from alembic import command

from agent.protocol.facts import AcceleratorFacts, DeviceFacts, RuntimeFacts
from agent.protocol.messages import Reported, ServingReport
from agent.protocol.version import SPOKEN
from fleet_server import migrations
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import repository, service
from fleet_server.devices.attributes import Attribute, attributes_of, number_of
from fleet_server.devices.schemas import DeviceUpdate
from fleet_server.errors import InvalidError
from fleet_server.models import Device, DeviceAttribute
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rsql import And, Comparison, Node, Operator, Or, Value, parse
from tests.reporting import record_report

FACTS = DeviceFacts("0.1", "Debian", "6.1", "x86_64", "cpu", 4, ("avx2",), 2048, 100)


def report(device_id: str, **changed: Any) -> tuple[str, Reported]:
    serving = changed.pop("serving", ())
    sequence = changed.pop("sequence", 1)
    facts = msgspec.structs.replace(FACTS, **changed)
    return device_id, Reported(SPOKEN, "boot", sequence, 0, facts, serving=serving)


def serves(model: str, version: str, provider: str = "cpu") -> ServingReport:
    return ServingReport(model, version, "a" * 64, "d", "onnxruntime 1.31", provider, 0.1)


def populate(database: Database) -> None:
    with database.write() as session:
        for one in (
            report("cam-01", arch="aarch64", memory_mb=1024, tags={"site": "plant7", "line": "3"}),
            report("cam-02", arch="aarch64", memory_mb=4096, tags={"site": "plant8"}, serving=(serves("mnist", "2"),)),
            report(
                "Cam-03",
                accelerators=(AcceleratorFacts("cuda", "Orin", "8.7", 8192),),
                runtimes=(RuntimeFacts("onnx", "onnxruntime-gpu", "1.31", ("cuda", "cpu")),),
                tags={"site": "plant7", "na%me_": "50%_*"},
                serving=(serves("mnist", "1", "cuda"), serves("yolo", "2")),
            ),
            report("box-04", cpu_features=("avx2", "avx512_vnni"), tags={"line": "3.0"}),
        ):
            record_report(session, *one, now=utc_now())
        session.get_one(Device, "box-04").online = False


def found(database: Database, query: str) -> list[str]:
    with database.read() as session:
        condition = service.query_condition(session, DEFAULT_FLEET, query, field="query")
        return [device.id for device in repository.devices_where(session, DEFAULT_FLEET, condition)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("site==plant7", ["Cam-03", "cam-01"]),
        ("site==plant7;accelerator==cuda", ["Cam-03"]),
        ("site!=plant7", ["box-04", "cam-02"]),
        ("site==*", ["Cam-03", "cam-01", "cam-02"]),
        ("site==plant?", []),
        ("id==cam-*", ["cam-01", "cam-02"]),
        ("id=out=(cam-01,cam-02)", ["Cam-03", "box-04"]),
        ("memory_mb>=2048;memory_mb<4096", ["Cam-03", "box-04"]),
        ("compute_capability>=8", ["Cam-03"]),
        ("line==3", ["box-04", "cam-01"]),
        ("cpu_feature==avx512_vnni", ["box-04"]),
        ("provider==cuda,online==false", ["Cam-03", "box-04"]),
        ("running.provider!=cuda;model==mnist", ["cam-02"]),
        ("version=in=(mnist@2,yolo@2)", ["Cam-03", "cam-02"]),
        ("tag.nowhere!=x;arch==aarch64", ["cam-01", "cam-02"]),
        ("na:me==x,tag.na==y", None),
        ("profile==p,profile!=p", ["Cam-03", "box-04", "cam-01", "cam-02"]),
    ],
)
def test_what_a_query_selects(database: Database, query: str, expected: list[str] | None) -> None:
    populate(database)
    if expected is None:
        with pytest.raises(InvalidError, match="write tag"):
            found(database, query)
        return
    assert sorted(found(database, query)) == expected


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("acelerator!=cuda", "'acelerator' is no attribute, and no device has a tag of that name"),
        ("id>5", "id has no order"),
        ("memory_mb>=much", "takes a number"),
        ("online==maybe", "true or false"),
        ("site=", "not a query"),
    ],
)
def test_what_can_not_be_asked_is_refused_by_the_name_of_the_field(database: Database, query: str, said: str) -> None:
    populate(database)
    with pytest.raises(InvalidError) as raised:
        found(database, query)
    assert said in raised.value.detail
    assert raised.value.detail.startswith("query: ")


def test_queries_follow_what_devices_say_and_people_tag(database: Database) -> None:
    populate(database)
    with database.write() as session:
        record_report(session, *report("cam-01", sequence=2, tags={"site": "plant9"}), now=utc_now())
        service.update_device(session, DEFAULT_FLEET, "cam-02", DeviceUpdate(tags={"ring": "canary"}), actor="me")
    assert found(database, "site==plant9") == ["cam-01"]
    assert found(database, "site==plant7") == ["Cam-03"]
    assert found(database, "ring==canary;site==plant8") == ["cam-02"]
    with database.write() as session:
        session.get_one(Device, "cam-02").online = False
        service.forget_device(session, DEFAULT_FLEET, "cam-02", actor="me")
    assert found(database, "ring==canary") == []


def test_devices_of_before_the_migration_are_found(database: Database) -> None:
    populate(database)
    with database.write() as session:
        expected = {(row.device_id, row.name, row.text) for row in session.query(DeviceAttribute)}
    for direction, revision in ((command.downgrade, "0008"), (command.upgrade, "head")):
        with database.write() as session:
            direction(migrations.configuration(session.connection()), revision)
    with database.read() as session:
        assert {(row.device_id, row.name, row.text) for row in session.query(DeviceAttribute)} == expected


def plainly(node: Node, device: Device, attributes: frozenset[Attribute]) -> bool:
    if isinstance(node, And):
        return all(plainly(part, device, attributes) for part in node.parts)
    if isinstance(node, Or):
        return any(plainly(part, device, attributes) for part in node.parts)
    if node.selector == "id":
        have = [Attribute("id", device.id, None)]
    else:
        names = {node.selector, f"tag.{node.selector}"}
        have = [one for one in attributes if one.name in names]
    some = any(holds(node, one, value) for one in have for value in node.values)
    return not some if node.operator in {Operator.UNEQUAL, Operator.OUT} else some


def holds(node: Comparison, one: Attribute, value: Value) -> bool:
    number = number_of(value.text)
    match node.operator:
        case Operator.LESS | Operator.AT_MOST | Operator.MORE | Operator.AT_LEAST:
            if one.number is None or number is None:
                return False
            return {"<": one.number < number, "<=": one.number <= number, ">": one.number > number}.get(
                node.operator.value, one.number >= number
            )
    pattern = re.compile(fnmatch.translate(value.text.replace("[", "[[]").replace("?", "[?]")))
    return bool(pattern.match(one.text)) or (number is not None and number == one.number)


def test_random_queries_select_what_a_plain_reading_selects(database: Database) -> None:
    populate(database)
    rng = random.Random(3)
    words = ["plant7", "plant*", "*", "3", "3.0", "1024", "cuda", "Cam-*", "cam-0*", "50%_*", "mnist", "2048"]
    names = ["site", "line", "memory_mb", "accelerator", "id", "model", "provider", "cpu_feature"]
    with database.read() as session:
        devices = repository.all_devices(session, DEFAULT_FLEET)
        known = {one.id: attributes_of(one.facts, one.tags, one.serving) for one in devices}
    selected = 0
    for _ in range(300):
        parts = []
        for _ in range(rng.randint(1, 4)):
            operator = rng.choice(["==", "!=", "=in=", "=out=", ">=", "<"])
            name = rng.choice(names)
            if operator in {">=", "<"}:
                parts.append(f"memory_mb{operator}{rng.choice([1024, 2048, 5000])}")
            elif operator in {"=in=", "=out="}:
                parts.append(f"{name}{operator}({','.join(map(repr, rng.sample(words, 2)))})")
            else:
                parts.append(f"{name}{operator}'{rng.choice(words)}'")
        query = rng.choice([";", ","]).join(parts)
        if len(parts) > 2:
            query = f"({parts[0]},{parts[1]});" + ";".join(parts[2:])
        expected = sorted(one.id for one in devices if plainly(parse(query), one, known[one.id]))
        assert sorted(found(database, query)) == expected, query
        selected += len(expected)
    assert selected > 100
