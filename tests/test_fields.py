"""Dataclasses from plain data: what fits, and what is said of what does not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.fields import FieldError, read_fields


@dataclass(frozen=True)
class Inner:
    name: str
    size: int


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    inner: Inner | None
    table: dict[str, Inner]
    names: list[str]
    pair: tuple[int, int] | None
    flag: bool
    free: Any


TREE: dict[str, Any] = {
    "kind": "a",
    "inner": {"name": "x", "size": 3},
    "table": {"k": {"name": "y", "size": 0}},
    "names": ["n"],
    "pair": [1, 2],
    "flag": True,
    "free": object,
}


def test_what_fits() -> None:
    assert read_fields(Outer, TREE) == Outer("a", Inner("x", 3), {"k": Inner("y", 0)}, ["n"], (1, 2), True, object)
    nothing = {**TREE, "inner": None, "pair": None, "table": {}, "names": ()}
    assert read_fields(Outer, nothing) == Outer("a", None, {}, [], None, True, object)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "c", r"^kind is 'c'; expected Literal\['a', 'b'\]$"),
        ("kind", ["a"], r"^kind is \['a'\]; expected Literal"),
        ("inner", 5, "^inner is 5; expected an object$"),
        ("inner", {"name": "x"}, "^inner.size is missing$"),
        ("inner", {"name": "x", "size": -1}, "^inner.size is -1; expected int$"),
        ("inner", {"name": "x", "size": True}, "^inner.size is True; expected int$"),
        ("inner", {"name": "x", "size": 2**63}, "^inner.size is 9223372036854775808; expected int$"),
        ("inner", {"name": "x", "size": 1, "more": 2}, "^inner.'more' is no field; expected name, size$"),
        ("table", {"k": {"name": None, "size": 1}}, r"^table\['k'\].name is None; expected str$"),
        ("table", {5: {}}, r"^table is \{5: \{\}\}; expected dict"),
        ("names", "n", r"^names is 'n'; expected list\[str\]$"),
        ("names", ["n", b"m"], r"^names\[1\] is b'm'; expected str$"),
        ("pair", [1], r"^pair is \[1\]; expected tuple\[int, int\]$"),
        ("flag", 1, "^flag is 1; expected bool$"),
    ],
)
def test_what_does_not_fit_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        read_fields(Outer, {**TREE, field: value})


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*TREE, "name", "size"]), inner, max_size=9)
        ),
    )
)
def test_anything_is_read_or_refused(tree: Any) -> None:
    for given_tree in (tree, {**TREE, **tree} if isinstance(tree, dict) else tree):
        with suppress(FieldError):
            assert type(read_fields(Outer, given_tree)) is Outer
