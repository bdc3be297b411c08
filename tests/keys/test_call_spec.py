"""A call described: every kind of argument is read back, and what differs is named."""

import enum
import inspect
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import Refusal
from graphcache.keys.call_key import describe
from graphcache.keys.call_spec import CallSpec, TensorSpec, contiguous
from tests.helpers import constants, structures, tensors

Pair = namedtuple("Pair", ["left", "right"])


class Mode(enum.Enum):
    FAST = 1


def words(*args, names=("x", "y"), **kwargs):
    return CallSpec.of(args, kwargs, names)


X = torch.zeros(2, 3)


def _with(**attributes):
    tensor = torch.zeros(2, 3)
    vars(tensor).update(attributes)
    return tensor


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "no arguments"),
        ((X,), {}, "x: float32[2, 3]"),
        ((X, X.half(), X.int()), {}, "x: float32[2, 3], y: float16[2, 3], args[2]: int32[2, 3]"),
        ((X.t(),), {}, "x: float32[3, 2] with strides (1, 3)"),
        ((torch.zeros(()),), {}, "x: float32[]"),
        ((0.5, 1), {}, "x: 0.5, y: 1"),
        ((True, None), {}, "x: True, y: None"),
        ((float("nan"), -0.0), {}, "x: nan, y: -0.0"),
        ((1 + 2j, "a"), {}, "x: (1+2j), y: 'a'"),
        ((torch.float16, Mode.FAST), {}, "x: torch.float16, y: Mode.FAST"),
        (([X, 1], (X.clone(),)), {}, "x[0]: float32[2, 3], x[1]: 1, y[0]: float32[2, 3]"),
        (({"ids": X, "n": {"deep": 2}},), {}, "x['ids']: float32[2, 3], x['n']['deep']: 2"),
        ((Pair(X, 2),), {}, "x.left: float32[2, 3], x.right: 2"),
        ((OrderedDict(a=X),), {}, "x[0]: float32[2, 3]"),
        ((slice(1, 2), range(3)), {}, "x: slice(1, 2, None), y: range(0, 3)"),
        ((torch.Size([2]),), {}, "x: torch.Size([2])"),
        ((), {"mask": X, "flip": False}, "mask: float32[2, 3], flip: False"),
        ((torch.zeros(2, dtype=torch.cfloat).conj(), 1), {}, "x: complex64[2], y: 1"),
    ],
)
def test_arguments_are_read_back(args, kwargs, said):
    found = words(*args, **kwargs)
    assert str(found) == said


def test_modes_are_read_back():
    with torch.no_grad():
        assert words(X).modes == {}
    assert words(X).modes == {"grad mode": "on"}
    assert words(X, X.clone().requires_grad_()).modes == {"grad mode": "on, tensors [1] require gradients"}
    with torch.inference_mode(), torch.autocast("cpu"):
        assert words(X).modes == {"inference mode": "on", "autocast": "cpu bfloat16"}


def test_names_come_from_the_function():
    function = inspect.signature(lambda input_ids, *rest, mask=None: None)
    assert str(words(X, 1, names=function)) == "input_ids: float32[2, 3], args[1]: 1"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ((torch.zeros(1, 77),), (torch.zeros(1, 78),), ["`x` dim 1: 77 → 78"]),
        ((torch.zeros(1, 77),), (torch.zeros(2, 78),), ["`x` dim 0: 1 → 2", "`x` dim 1: 77 → 78"]),
        ((X,), (X[0],), ["`x` shape: [2, 3] → [3]"]),
        ((X,), (X.half(),), ["`x` dtype: float32 → float16"]),
        ((X,), (torch.zeros(3, 2).t(),), ["`x` strides: contiguous → (1, 2)"]),
        ((X,), (torch.empty(2, 3, device="meta"),), ["`x` device: cpu → meta"]),
        ((X, 1), (X, True), ["`y`: 1 → True"]),
        ((X, 1), (X,), ["`y`: 1 → absent"]),
        (([X],), ([X, 1],), ["`x`: list of 1 → list of 2", "`x[1]`: absent → 1"]),
        ((X, X), (X, X.clone()), ["tensors given twice: by place (0, 0) → off"]),
        ((X,), (_with(note=1),), ["`x` attributes: none → {'note': 1}"]),
        (
            (torch.zeros(2, dtype=torch.cfloat),),
            (torch.zeros(2, dtype=torch.cfloat).conj(),),
            ["`x` pending: nothing → conjugation"],
        ),
        ((X,), (X,), []),
    ],
)
def test_differences_are_named(old, new, said):
    assert words(*old).diff(words(*new)) == said


def test_differences_of_modes():
    outside = words(X)
    with torch.inference_mode():
        inside = words(X)
    assert outside.diff(inside) == ["grad mode: on → off", "inference mode: off → on"]


def test_the_nearer_call_is_the_one_that_differs_less():
    here = words(torch.zeros(1, 78))
    apart = [words(each).distance(here) for each in (torch.zeros(1, 77), torch.zeros(1, 64), torch.zeros(2, 77))]
    assert apart == sorted(apart)
    assert here.distance(here) == (0, 0.0)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([torch.float16, X, X.t(), torch.zeros(0, 4), Mode.FAST, slice(1), range(2), torch.Size([1, 2])]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@given(st.lists(values, max_size=3), st.dictionaries(st.sampled_from(["a", "b"]), values, max_size=2))
def test_whatever_has_a_key_is_read_back(args, kwargs):
    call = describe(tuple(args), kwargs)
    found = CallSpec(call.key)
    assert len(found.tensors) == len(call.tensors)
    assert sum(type(each) is TensorSpec for each in found.values.values()) == len(call.tensors)
    assert found.diff(CallSpec(call.key)) == []
    assert found == CallSpec(call.key)


arguments = st.lists(structures(constants | tensors()), max_size=3).map(tuple)


@given(arguments, arguments)
def test_two_calls_have_one_spec_where_they_have_one_key(left, right):
    alike = describe(left, {}).key == describe(right, {}).key
    assert (CallSpec.of(left, {}) == CallSpec.of(right, {})) == alike
    assert (CallSpec.of(left, {}).diff(CallSpec.of(right, {})) == []) == alike


@given(tensors())
def test_contiguous_is_that_of_torch(tensor):
    assert contiguous(tensor.shape) == torch.empty(tensor.shape).stride()


def test_values_that_an_engine_reads_on_the_host_are_told():
    key = describe((X, torch.tensor([2, 3])), {}).key
    spec, other = (CallSpec(key._replace(host_values=(values,))) for values in ((2, 3), (2, 4)))
    assert spec != other
    assert spec.diff(other) == ["values read on the host: ((2, 3),) → ((2, 4),)"]


def test_more_containers_in_one_another_than_a_key_has_are_refused():
    deep = 1
    for _ in range(32):
        deep = [deep]
    assert str(CallSpec.of((deep,), {}, "x")) == f"x{'[0]' * 32}: 1"
    with pytest.raises(Refusal, match="more than 32 containers in one another"):
        CallSpec.of(([deep],), {})
