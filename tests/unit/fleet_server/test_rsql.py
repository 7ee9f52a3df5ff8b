"""Queries are read as they are meant, and what is none is refused in words that help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.rsql import (
    MOST_COMPARISONS,
    MOST_VALUES,
    And,
    Comparison,
    Node,
    Operator,
    Or,
    RsqlError,
    Value,
    comparisons,
    parse,
)


def is_(selector: str, operator: Operator, *values: str) -> Comparison:
    return Comparison(selector, operator, tuple(Value(one) for one in values))


A, B, C = (is_(name, Operator.EQUAL, "1") for name in "abc")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a==1", A),
        ("a==1;b==1", And((A, B))),
        ("a==1,b==1", Or((A, B))),
        ("a==1 and b==1 or c==1", Or((And((A, B)), C))),
        ("a==1;(b==1,c==1)", And((A, Or((B, C))))),
        ("((a==1))", A),
        (" a == 1 ;\n b==1 ", And((A, B))),
        ("order==or", is_("order", Operator.EQUAL, "or")),
        ("memory_mb=ge=2048", is_("memory_mb", Operator.AT_LEAST, "2048")),
        ("memory_mb<2", is_("memory_mb", Operator.LESS, "2")),
        ('a=in=(x,\'y z\',"q\\"")', is_("a", Operator.IN, "x", "y z", 'q"')),
        ("a=out=x", is_("a", Operator.OUT, "x")),
        ("tag.site-name!=plant*", is_("tag.site-name", Operator.UNEQUAL, "plant*")),
        ("version==mnist@2.1.0+b", is_("version", Operator.EQUAL, "mnist@2.1.0+b")),
    ],
)
def test_what_is_meant(text: str, meant: Node) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("a", "at character"),
        ("a=b", "at character 2"),
        ("a==", "not a query"),
        ("a==b c==d", "at character 6"),
        ("a=like=b", "there is no such operator"),
        ("a==(b,c)", "a=in=(…)"),
        ("(a==1", "not a query"),
        ("a==1)", "not a query"),
        ("a=='b", "not a query"),
        ("1a==b", "not a query"),
        ("(" * 17 + "a==1" + ")" * 17, "16 parentheses"),
        ("(" * 2000 + "a==1" + ")" * 2000, "16 parentheses"),
        ("a==" + "x" * 5000, "4096 characters"),
        (",".join(["a==1"] * (MOST_COMPARISONS + 1)), "64 comparisons"),
        (f"a=in=({','.join(['x'] * (MOST_VALUES + 1))})", "500 values"),
    ],
)
def test_what_is_none_is_refused_with_the_place_and_the_remedy(text: str, said: str) -> None:
    with pytest.raises(RsqlError) as raised:
        parse(text)
    assert said in str(raised.value)


names = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def written(node: Node) -> str:
    if isinstance(node, Comparison):
        quoted = ['"' + one.text.replace("\\", "\\\\").replace('"', '\\"') + '"' for one in node.values]
        several = f"({','.join(quoted)})"
        return f"{node.selector}{node.operator}{several if len(quoted) > 1 else quoted[0]}"
    joined = (";" if isinstance(node, And) else " or ").join(written(part) for part in node.parts)
    return f"({joined})"


single = st.builds(is_, names, st.sampled_from([Operator.EQUAL, Operator.UNEQUAL, Operator.MORE]), values)
several = st.builds(
    lambda name, operator, found: is_(name, operator, *found),
    names,
    st.sampled_from([Operator.IN, Operator.OUT]),
    st.lists(values, min_size=1, max_size=3),
)
nodes: st.SearchStrategy[Node] = st.recursive(
    single | several,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Or(tuple(parts))),
    ),
    max_leaves=8,
)


@given(nodes)
def test_what_is_written_is_read(node: Node) -> None:
    assert parse(written(node)) == node


@given(st.text(max_size=60))
def test_any_text_is_a_query_or_refused(text: str) -> None:
    try:
        found = list(comparisons(parse(text)))
    except RsqlError:
        return
    assert found
