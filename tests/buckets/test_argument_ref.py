from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.buckets.padder import ArgumentRef, find_argument
from graphcache.errors import ConfigError


def usual(x: Any, y: Any = None, *, z: Any = None) -> Any:
    return {"x": x, "y": y, "z": z}


def front(x: Any, /, y: Any = None) -> Any:
    return x, y


def anything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize(
    ("function", "key", "ref"),
    [
        (usual, "x", ArgumentRef(0, "x")),
        (usual, 1, ArgumentRef(1, "y")),
        (usual, "z", ArgumentRef(None, "z")),
        (front, "x", ArgumentRef(0, None)),
        (front, 0, ArgumentRef(0, None)),
        (anything, 7, ArgumentRef(7, None)),
        (anything, "a", ArgumentRef(None, "a")),
        (anything, "args", ArgumentRef(None, "args")),
    ],
)
def test_a_name_and_a_position_find_the_argument(function, key, ref):
    assert find_argument(key, inspect.signature(function), "option") == ref


@pytest.mark.parametrize(
    ("function", "key", "message"),
    [
        (usual, 2, r"^option: there are 2 positional arguments; expected the position of one"),
        (usual, "w", r"^option: no argument has this name; expected one of \['x', 'y', 'z'\]"),
        (lambda: 0, "w", r"^option: no argument has this name; expected one of \[\]"),
    ],
)
def test_an_argument_that_is_not_there_is_refused(function, key, message):
    with pytest.raises(ConfigError, match=message):
        find_argument(key, inspect.signature(function), "option")


@given(st.sampled_from("xyz"), st.integers(1, 2), st.booleans())
def test_what_is_put_is_what_the_function_gets_however_it_is_called(name, positional, absent):
    ref = find_argument(name, inspect.signature(usual), "option")
    values = {"x": 1, "y": 2, "z": 3}
    args: list[Any] = [values[each] for each in "xyz"[:positional]]
    kwargs = {each: values[each] for each in "xyz"[positional:] if not (absent and each == name)}
    assert ref.get(args, kwargs) == (None if absent and name in "xyz"[positional:] else values[name])
    ref.put("new", args, kwargs)
    assert ref.get(args, kwargs) == usual(*args, **kwargs)[name] == "new"
