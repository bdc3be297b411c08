from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.tree import TreeError
from graphcache.cache.tree_reader import Reader
from graphcache.cache.tree_writer import Writer


def read(tree: Any) -> Any:
    return Reader(lambda dtype, shape, stride, host: (dtype, shape, stride, host)).read(tree, "x")


def tensor(**fields: Any) -> Any:
    return {"tensor": {"dtype": "float32", "shape": [2, 3]} | fields}


def test_a_tensor_is_made_of_what_stands_there():
    assert read(tensor()) == (torch.float32, (2, 3), (3, 1), False)
    assert read(tensor(stride=[0, 1], host=True)) == (torch.float32, (2, 3), (0, 1), True)


X = tensor()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (1.5, r"^x is 1.5; expected a value, a list, or an object with one key"),
        ({}, r"^x is \{\}; expected"),
        ({"tuple": [], "list": []}, r"^x is \{.*\}; expected a value, a list, or an object with one key"),
        ({"set": []}, r"^x is \{'set': \[\]\}; expected one of the keys tuple, dict, float"),
        ([1, {"eval": "1"}], r"^x\[1\] is \{'eval': '1'\}; expected one of the keys"),
        ({"tuple": 5}, r"^x.tuple is 5; expected a list"),
        ({"dict": {"a": 1}}, r"^x.dict is \{'a': 1\}; expected a list of pairs"),
        ({"dict": [["a"]]}, r"^x.dict is \[\['a'\]\]; expected a list of pairs"),
        ({"dict": [["a", 1], ["a", 2]]}, r"^a key of x.dict is 'a'; expected each key once"),
        ({"dict": [[1, 1], [True, 2]]}, r"^a key of x.dict is True; expected each key once"),
        ({"dict": [[[], 1]]}, r"^a key of x.dict is \[\]; expected a constant that can be a key"),
        ({"dict": [[X, 1]]}, r"^a key of x.dict is .*; expected a constant, as no tensor can stand there"),
        ([X, {"dict": [[{"again": 0}, 1]]}], r"^a key of x\[1\].dict is .*; expected a constant, as no tensor"),
        ({"dict": [["a", 1.5]]}, r"^x.dict\['a'\] is 1.5; expected"),
        ({"float": 1}, r"^x.float is 1; expected a number as float.hex writes it"),
        ({"float": "one"}, r"^x.float is 'one'; expected a number"),
        ({"float": "0x1p99999"}, r"^x.float is '0x1p99999'; expected a number"),
        ({"float": "0x" + "1" * 100}, r"^x.float is '0x1+'; expected a number"),
        ({"complex": ["0x1p0"]}, r"^x.complex is \['0x1p0'\]; expected two numbers"),
        ({"complex": ["0x1p0", None]}, r"^x.complex is None; expected a number"),
        ({"bytes": "0"}, r"^x.bytes is '0'; expected hexadecimal digits"),
        ({"bytes": None}, r"^x.bytes is None; expected hexadecimal digits"),
        ({"slice": [1, 2]}, r"^x.slice is \[1, 2\]; expected start, stop and step"),
        ({"slice": [1, 2, X]}, r"^x.slice is .*; expected a constant, as no tensor can stand there"),
        ({"range": [0, 1, 0]}, r"^x.range is \[0, 1, 0\]; expected three whole numbers, the last of them not 0"),
        ({"range": [0, True, 1]}, r"^x.range is \[0, True, 1\]; expected three whole numbers"),
        ({"size": [-1]}, r"^x.size is -1; expected whole numbers from 0"),
        ({"dtype": "float31"}, r"^x.dtype is 'float31'; expected one of .*float32"),
        ({"dtype": ["float32"]}, r"^x.dtype is \['float32'\]; expected one of"),
        ({"layout": "Tensor"}, r"^x.layout is 'Tensor'; expected one of .*strided"),
        ({"memory_format": ""}, r"^x.memory_format is ''; expected one of .*channels_last"),
        ({"device": "cuda:0; rm"}, r"^x.device is 'cuda:0; rm'; expected a device such as cuda:0"),
        ({"device": 0}, r"^x.device is 0; expected a device"),
        ({"again": 0}, r"^x.again is 0; expected the place of one of 0 tensors before it"),
        ([X, {"again": True}], r"^x\[1\].again is True; expected the place of one of 1"),
        ([X, {"again": -1}], r"^x\[1\].again is -1; expected the place of one of 1"),
        ({"tensor": []}, r"^x.tensor is \[\]; expected 'dtype' and 'shape', and maybe 'stride' and 'host'"),
        (tensor(data=1), r"^x.tensor is .*; expected 'dtype' and 'shape', and maybe"),
        (tensor(dtype="qint8"), r"^x.tensor.dtype is 'qint8'; expected one of"),
        (tensor(dtype="float32\n"), r"^x.tensor.dtype is 'float32\\n'; expected one of"),
        (tensor(shape=3), r"^x.tensor.shape is 3; expected a list of at most 64 numbers"),
        (tensor(shape=[1] * 65), r"^x.tensor.shape is \[1, .*; expected a list of at most 64 numbers"),
        (tensor(shape=[True]), r"^x.tensor.shape is True; expected whole numbers from 0"),
        (tensor(shape=[2**63]), r"^x.tensor.shape is 9223372036854775808; expected whole numbers from 0"),
        (tensor(shape=[2**40, 2**40]), r"^x.tensor is .*; expected a tensor of at most 4398046511104 bytes"),
        (tensor(stride=[1]), r"^x.tensor.stride is \[1\]; expected 2 numbers"),
        (tensor(stride=[-1, 1]), r"^x.tensor.stride is -1; expected whole numbers"),
        (tensor(stride=[2**62, 1]), r"^x.tensor is .*; expected a tensor of at most"),
        (tensor(host=1), r"^x.tensor.host is 1; expected true or false"),
        (2**1025, r"^x is \d+...; expected at most 1024 bits"),
    ],
)
def test_damage_is_found_and_named(tree, message):
    with pytest.raises(TreeError, match=message):
        read(tree)


def test_what_is_too_deep_is_refused_long_before_it_is_read():
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(TreeError, match="expected at most 32 containers in one another"):
        read(deep)


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "float", "slice", "range", "size", "tensor", "again", "dtype", "shape"]),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@given(json_trees)
def test_whatever_json_there_is_a_value_or_a_typed_error(tree):
    try:
        value = read(tree)
    except TreeError as error:
        said = str(error)
    else:
        said = "; expected"
        hash(repr(value))
    assert "; expected" in said


@given(st.data())
def test_one_node_exchanged_gives_a_value_or_a_typed_error(data):
    tree = Writer().write([(1, 2.5), {"a": torch.zeros(3, 2).t()}, slice(1), torch.Size([2]), b"x"], "x")
    holder, key = data.draw(st.sampled_from(list(_nodes(tree))))
    holder[key] = data.draw(json_trees)
    try:
        read(tree)
    except TreeError as error:
        said = str(error)
    else:
        said = "x"
    assert "x" in said


def _nodes(tree: Any) -> Any:
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from _nodes(tree[key])
