"""Devices by a query (`fleet_server.rsql`), as a condition that the database evaluates: reads and writes nothing.

`!=` and `=out=` hold where no value is the one that is named, so also where there is none. A number is equal however it
is written; `*` stands for any characters. A selector that is no attribute is a tag.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, false, not_, or_, select
from sqlalchemy.orm import InstrumentedAttribute

from fleet_server.devices.attributes import COLUMNS, NAMES, TAG, number_of
from fleet_server.errors import InvalidError
from fleet_server.models import Device, DeviceAttribute, Profile
from fleet_server.rsql import ORDERING, And, Comparison, Node, Operator, RsqlError, Value, comparisons, parse

_TRUTH = {"true": True, "false": False}


def read_query(text: str, field: str) -> Node:
    """A query in text.

    Raises:
        InvalidError: naming the field, where it is none, or asks what can't be asked.
    """
    try:
        node = parse(text)
    except RsqlError as error:
        raise _invalid(field, str(error)) from None
    for one in comparisons(node):
        _check(one, field)
    return node


def tags_in(node: Node) -> set[str]:
    """Tags that a query takes for such without saying so: a name that no device has is more likely a slip."""
    return {one.selector for one in comparisons(node) if not _known(one.selector)}


def condition(node: Node, fleet_id: str) -> ColumnElement[bool]:
    """What must hold of a row of `devices`, for a query that was read."""
    if isinstance(node, Comparison):
        return _compared(node, fleet_id)
    join = and_ if isinstance(node, And) else or_
    return join(*(condition(part, fleet_id) for part in node.parts))


def _known(selector: str) -> bool:
    return selector in COLUMNS or selector in NAMES or selector.startswith(TAG)


def _check(one: Comparison, field: str) -> None:
    if one.operator in ORDERING:
        if one.selector in COLUMNS:
            raise _invalid(field, f"{one.selector} has no order: compare it with ==, !=, =in= or =out=")
        if number_of(one.values[0].text) is None:
            raise _invalid(field, f"{one.selector}{one.operator}{one.values[0].text}: {one.operator} takes a number")
    if one.selector == "online" and any(value.text not in _TRUTH for value in one.values):
        raise _invalid(field, "online is true or false")


def _invalid(field: str, detail: str) -> InvalidError:
    return InvalidError("bad_query", f"{field}: {detail}", field=field)


def _compared(one: Comparison, fleet_id: str) -> ColumnElement[bool]:
    found = _some(one, fleet_id)
    return not_(found) if one.operator in {Operator.UNEQUAL, Operator.OUT} else found


def _some(one: Comparison, fleet_id: str) -> ColumnElement[bool]:
    """Whether some value of the selector is one of those named, or is in the order that is asked for."""
    if one.selector == "id":
        return or_(*(_text_is(Device.id, value) for value in one.values))
    if one.selector == "online":
        return Device.online.in_([_TRUTH[value.text] for value in one.values])
    if one.selector == "profile":
        names = select(Profile.id).where(
            Profile.fleet_id == fleet_id, or_(*(_text_is(Profile.name, value) for value in one.values))
        )
        return and_(Device.profile_id.is_not(None), Device.profile_id.in_(names))
    name = one.selector if _known(one.selector) else TAG + one.selector
    rows = select(DeviceAttribute.device_id).where(
        DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == name, _value(one)
    )
    return Device.id.in_(rows)


def _value(one: Comparison) -> ColumnElement[bool]:
    number = DeviceAttribute.number
    if one.operator in ORDERING:
        bound = number_of(one.values[0].text)
        ordered = {
            Operator.LESS: number < bound,
            Operator.AT_MOST: number <= bound,
            Operator.MORE: number > bound,
            Operator.AT_LEAST: number >= bound,
        }
        return ordered[one.operator]
    numbers = [found for value in one.values if (found := number_of(value.text)) is not None]
    same = or_(*(_text_is(DeviceAttribute.text, value) for value in one.values))
    return or_(same, number.in_(numbers) if numbers else false())


def _text_is(column: InstrumentedAttribute[str], value: Value) -> ColumnElement[bool]:
    if not value.pattern:
        return column == value.text
    escaped = value.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return column.like(escaped, escape="\\")
