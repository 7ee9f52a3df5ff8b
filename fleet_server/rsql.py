"""RSQL, the query language of lists and targets: text to a tree, or an error that says where and what would do. Pure.

`site==plant7;accelerator==cuda`, `memory_mb>=2048 and (arch==aarch64 or arch==armv7l)`, `model=in=(a,b)`, `id==cam-*`.
The grammar is that of https://github.com/jirutka/rsql-parser, a superset of FIQL (draft-nottingham-atompub-fiql-00).
What selectors there are, and what their values mean, is for those to say who use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lark import Lark

LONGEST = 4096  # characters
MOST_COMPARISONS = 64
DEEPEST = 16  # parentheses within parentheses
MOST_VALUES = 500

_GRAMMAR = r"""
?start: or_
?or_: and_ ((_COMMA | _OR) and_)*
?and_: constraint ((_SEMICOLON | _AND) constraint)*
?constraint: "(" or_ ")" | comparison
comparison: SELECTOR OPERATOR arguments
?arguments: value -> one | "(" value (_COMMA value)* ")" -> several
value: UNQUOTED | DOUBLE | SINGLE
_COMMA: ","
_SEMICOLON: ";"
_OR.2: /\s+or\s+/
_AND.2: /\s+and\s+/
SELECTOR: /[A-Za-z_][\w.\/:-]*/
OPERATOR.3: /==|!=|<=|>=|<|>|=[a-z]+=/
UNQUOTED: /[^"'();,=!~<>\s]+/
DOUBLE: /"(?:[^"\\]|\\.)*"/
SINGLE: /'(?:[^'\\]|\\.)*'/
%ignore /\s+(?!(?:or|and)\s)/
"""


class RsqlError(ValueError):
    """A query that can't be read: says where, and what would do."""


class Operator(StrEnum):
    """How a selector is compared."""

    EQUAL = "=="
    UNEQUAL = "!="
    LESS = "<"
    AT_MOST = "<="
    MORE = ">"
    AT_LEAST = ">="
    IN = "=in="
    OUT = "=out="


ORDERING = frozenset({Operator.LESS, Operator.AT_MOST, Operator.MORE, Operator.AT_LEAST})
_SPELLINGS = {
    "=lt=": Operator.LESS,
    "=le=": Operator.AT_MOST,
    "=gt=": Operator.MORE,
    "=ge=": Operator.AT_LEAST,
    **{one.value: one for one in Operator},
}


@dataclass(frozen=True)
class Value:
    """One value of a comparison, as meant: without its quotes."""

    text: str

    @property
    def pattern(self) -> bool:
        """Whether a `*` in it stands for any characters."""
        return "*" in self.text


@dataclass(frozen=True)
class Comparison:
    """A selector compared with one value, or with several where the operator is `=in=` or `=out=`."""

    selector: str
    operator: Operator
    values: tuple[Value, ...]


@dataclass(frozen=True)
class And:
    """Every part holds."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Or:
    """Some part holds."""

    parts: tuple[Node, ...]


Node = Comparison | And | Or


def parse(text: str) -> Node:
    """Read a query.

    Raises:
        RsqlError: where it is none, or is beyond the bounds.
    """
    if len(text) > LONGEST:
        raise RsqlError(f"a query may have {LONGEST} characters, not {len(text)}: use `=in=`, or a tag")
    if _depth(text) > DEEPEST:
        raise RsqlError(f"a query may have {DEEPEST} parentheses within each other")
    node = _parsed(text)
    found = list(comparisons(node))
    if len(found) > MOST_COMPARISONS:
        raise RsqlError(f"a query may have {MOST_COMPARISONS} comparisons, not {len(found)}: use `=in=`, or a tag")
    for one in found:
        if len(one.values) > MOST_VALUES:
            raise RsqlError(f"{one.selector}{one.operator} may have {MOST_VALUES} values, not {len(one.values)}")
    return node


def comparisons(node: Node) -> Iterator[Comparison]:
    """Every comparison of a query, from left to right."""
    if isinstance(node, Comparison):
        yield node
        return
    for part in node.parts:
        yield from comparisons(part)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in re.sub(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", "", text):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _parsed(text: str) -> Node:
    from lark.exceptions import UnexpectedInput

    try:
        tree = _parser().parse(text.strip())
    except UnexpectedInput as error:
        place = error.get_context(text.strip(), 20).split("\n")[0].strip() if text.strip() else "it is empty"
        raise RsqlError(
            f"not a query, at character {max(error.column, 1)} ({place}): write e.g. site==plant7;memory_mb>=2048, "
            "with ; for and, with , for or, and quotes around values with blanks"
        ) from None
    return _node(tree)


@cache
def _parser() -> Lark:
    from lark import Lark

    return Lark(_GRAMMAR, parser="lalr", lexer="contextual")


def _node(tree: Any) -> Node:
    if tree.data == "comparison":
        return _comparison(*tree.children)
    parts = tuple(_node(child) for child in tree.children)
    return And(parts) if tree.data == "and_" else Or(parts)


def _comparison(selector: str, spelled: str, arguments: Any) -> Comparison:
    operator = _SPELLINGS.get(str(spelled))
    if operator is None:
        known = ", ".join(_SPELLINGS)
        raise RsqlError(f"{selector}{spelled}: there is no such operator; there are {known}")
    values = tuple(_value(one) for one in arguments.children)
    if operator in {Operator.IN, Operator.OUT}:
        return Comparison(str(selector), operator, values)
    if arguments.data == "several":
        raise RsqlError(f"{selector}{spelled} takes one value: use {selector}=in=(…) or {selector}=out=(…) for several")
    return Comparison(str(selector), operator, values)


def _value(tree: Any) -> Value:
    token = tree.children[0]
    if token.type == "UNQUOTED":
        return Value(str(token))
    return Value(re.sub(r"\\(.)", r"\1", str(token)[1:-1], flags=re.DOTALL))
