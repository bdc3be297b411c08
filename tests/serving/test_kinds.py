"""Kinds as text, which other processes read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ServingError
from graphcache.serving.kinds import read_kind, written_kind
from tests.helpers import DTYPES

parts = st.tuples(st.text(), st.sampled_from(DTYPES), st.lists(st.integers(0, 2**40), max_size=4).map(tuple))


@given(st.lists(parts, max_size=4).map(tuple))
def test_there_and_back(kind):
    assert read_kind(written_kind(kind)) == kind


@given(
    st.text() | st.sampled_from(["null", "5", "[[]]", '[["x","nn",[1]]]', '[["x","float32",["1"]]]', '[[1,"bool",[]]]'])
)
def test_anything_else_is_refused_or_a_kind(text):
    try:
        found = read_kind(text)
    except ServingError:
        return
    assert read_kind(written_kind(found)) == found


def test_the_message():
    with pytest.raises(ServingError, match=r"^'\[\[\"x\",\"os\",\[1\]\]\]' is no kind of requests"):
        read_kind('[["x","os",[1]]]')
    assert written_kind((("x", torch.bfloat16, ()),)) == '[["x","bfloat16",[]]]'
