"""Named inputs and outputs: what is read off an engine, and what may be given for them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graphcache.engines import bindings
from graphcache.engines.bindings import Binding, check_inputs, choose_profile, out_of_range, read_bindings, torch_dtype
from graphcache.errors import (
    EngineError,
    InputCountError,
    InputDeviceError,
    InputDtypeError,
    InputError,
    InputRankError,
    InputTypeError,
    ProfileRangeError,
)
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IO, NETWORKS, DataType, Dims, ICudaEngine, ILogger, Network

CPU = torch.device("cpu")
X = Binding("x", True, torch.float32, (-1, 4), False, (((1, 4), (4, 4)), ((8, 16), (4, 4))))
S = Binding("s", True, torch.int64, (1,), True, (((1, 4),), ((8, 16),)))


def engine(network: Network) -> ICudaEngine:
    return ICudaEngine(network, ILogger())


def of_type(dtype: DataType) -> Network:
    return Network((IO("x", True, (2,), dtype),), lambda shapes, values: {}, lambda given: {})


# ---- reading


def test_reads_every_binding_in_the_engines_order() -> None:
    read = read_bindings(engine(NETWORKS["affine"]), fake_tensorrt)
    assert read == (X, Binding("y", False, torch.float32, (-1, 4), False))


def test_reads_values_of_host_shape_tensors() -> None:
    x, stop, y = read_bindings(engine(NETWORKS["head"]), fake_tensorrt)
    assert stop == Binding("stop", True, torch.int64, (1,), True, (((1, 16),),))
    assert (x.on_host, y.on_host, y.ranges) == (False, False, ())


def test_profile_values_in_the_documented_order_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ICudaEngine.get_tensor_profile_values

    def documented(self: ICudaEngine, name: str, profile_index: int) -> Any:
        if not isinstance(name, str):
            raise TypeError("incompatible function arguments")
        return real(self, profile_index, name)

    monkeypatch.setattr(ICudaEngine, "get_tensor_profile_values", documented)
    assert read_bindings(engine(NETWORKS["head"]), fake_tensorrt)[1].ranges == (((1, 16),),)


def test_a_host_shape_tensor_without_values_takes_any() -> None:
    network = Network((IO("s", True, (2,), DataType.INT64, host=True),), lambda shapes, values: {}, lambda given: {})
    (read,) = read_bindings(engine(network), fake_tensorrt)
    assert read.ranges == ((),)
    assert read.fits(read.sizes(torch.tensor([5, -7])), 0)


@pytest.mark.parametrize("dtype", list(DataType), ids=lambda dtype: dtype.name)
def test_every_dtype_is_held_by_torch_or_refused_by_name(dtype: DataType) -> None:
    if dtype in (DataType.INT4, DataType.FP4):
        with pytest.raises(EngineError) as caught:
            read_bindings(engine(of_type(dtype)), fake_tensorrt)
        assert re.match(
            rf"binding 'x' has the TensorRT dtype DataType\.{dtype.name}, which torch .* cannot hold; rebuild the "
            "engine with a cast to one of BF16, BOOL, .* at this binding",
            str(caught.value),
        )
        return
    (read,) = read_bindings(engine(of_type(dtype)), fake_tensorrt)
    assert read.dtype.itemsize == {"FLOAT": 4, "INT32": 4, "INT64": 8, "HALF": 2, "BF16": 2}.get(dtype.name, 1)
    assert read.dtype.is_floating_point == (dtype.name in ("FLOAT", "HALF", "BF16", "FP8", "E8M0"))
    assert fake_tensorrt.TORCH.get(dtype, read.dtype) is read.dtype


def test_a_dtype_of_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bindings._DTYPES, "FP8", "float8_of_tomorrow")
    with pytest.raises(EngineError, match=r"FP8, which torch .* cannot hold"):
        torch_dtype(fake_tensorrt, DataType.FP8, "x")


# ---- checking


def check(*inputs: Any, takes: tuple[Binding, ...] = (X,), device: torch.device = CPU) -> None:
    check_inputs("net", takes, inputs, device)


def test_accepts_what_fits() -> None:
    check(torch.zeros(3, 4))
    check(torch.zeros(0, 4)), check(torch.zeros(10**6, 4).to("meta"), device=torch.device("meta"))
    check(torch.zeros(3, 4), torch.tensor([2]), takes=(X, S))
    check(takes=())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), InputCountError, "net takes 1 inputs (x), 0 were given"),
        ((torch.zeros(1, 4), 2), InputCountError, "net takes 1 inputs (x), 2 were given"),
        (([1.0],), InputTypeError, "input 'x' of net is of type list; expected a torch.Tensor of torch.float32"),
        ((None,), InputTypeError, "input 'x' of net is of type NoneType; expected a torch.Tensor of torch.float32"),
        (
            (torch.zeros(1, 4).half(),),
            InputDtypeError,
            (
                "input 'x' of net is torch.float16, the engine takes torch.float32; convert it with .to(torch.float32) "
                "(nothing is cast silently)"
            ),
        ),
        (
            (torch.zeros(1, 4, device="meta"),),
            InputDeviceError,
            (
                "input 'x' of net lies on meta, the engine on cpu; move it with .to('cpu'), or let "
                "graphcache.runtime.set_multi_device_safe_mode(True) move it at every call"
            ),
        ),
        (
            (torch.zeros(4),),
            InputRankError,
            "input 'x' of net has shape (4,), the engine takes [any, 4]",
        ),
        (
            (torch.zeros(2, 5),),
            ProfileRangeError,
            "input 'x' of net has shape (2, 5), the engine takes [any, 4]",
        ),
    ],
)
def test_refuses_by_message(inputs: tuple[Any, ...], error: type[InputError], message: str) -> None:
    with pytest.raises(error) as caught:
        check(*inputs)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_host_shape_tensors_may_lie_anywhere() -> None:
    check(torch.zeros(3, 4, device="meta"), torch.tensor([2]), takes=(X, S), device=torch.device("meta"))


def test_the_first_wrong_input_is_named() -> None:
    with pytest.raises(InputDtypeError, match=r"input 's' of net is torch\.float32"):
        check(torch.zeros(3, 4), torch.zeros(2, 2), takes=(X, S))


# ---- profiles

sizes = st.integers(0, 9)
ranges = st.tuples(sizes, sizes).map(sorted).map(tuple)
profiles = st.lists(st.tuples(ranges, ranges), min_size=1, max_size=3)


@given(profiles, st.tuples(sizes, sizes), st.integers(0, 2))
def test_the_current_profile_if_it_fits_else_the_first(
    table: list[tuple[tuple[int, int], ...]], shape: tuple[int, int], current: int
) -> None:
    assume(current < len(table))
    binding = Binding("x", True, torch.float32, (-1, -1), False, tuple(table))
    fitting = [
        index
        for index, axes in enumerate(table)
        if all(low <= size <= high for size, (low, high) in zip(shape, axes, strict=True))
    ]
    value = torch.empty(shape)
    assert [index for index in range(len(table)) if binding.fits(shape, index)] == fitting
    if fitting:
        wanted = current if current in fitting else fitting[0]
        assert choose_profile("net", [binding], [value], [current, *range(len(table))]) == wanted
        return
    with pytest.raises(ProfileRangeError) as caught:
        choose_profile("net", [binding], [value], [current, *range(len(table))])
    assert f"shape {shape}" in str(caught.value)
    assert all(f"profile {index}: " in str(caught.value) for index in range(len(table)))


def test_values_of_host_shape_tensors_count() -> None:
    assert choose_profile("net", [S], [torch.tensor([9])], range(2)) == 1
    with pytest.raises(ProfileRangeError) as caught:
        choose_profile("net", [S], [torch.tensor([5])], range(2))
    assert str(caught.value) == (
        "input 's' of net has values [5], outside the engine's range (profile 0: 1..4; profile 1: 8..16); "
        "rebuild the engine with shapes that cover it, or split the call"
    )


def test_the_message_gives_fixed_sizes_as_one_number() -> None:
    assert str(out_of_range("net", X, (5, 4), [1])) == (
        "input 'x' of net has shape (5, 4), outside the engine's range (profile 1: 8..16 x 4); "
        "rebuild the engine with shapes that cover it, or split the call"
    )


def test_each_fits_some_profile_but_no_profile_fits_all() -> None:
    with pytest.raises(ProfileRangeError) as caught:
        choose_profile("net", [X, S], [torch.zeros(2, 4), torch.tensor([9])], range(2))
    assert str(caught.value) == (
        "each input of net fits some optimisation profile, but no single profile fits them all: x is (2, 4); s is "
        "(9,). Rebuild the engine with a profile that covers them together"
    )


def test_no_inputs_fit_any_profile() -> None:
    assert choose_profile("net", [], [], [1, 0, 1]) == 1


def test_shapes_are_read_as_tuples() -> None:
    assert tuple(Dims((2, 3))) == (2, 3)
    assert all(type(binding.shape) is tuple for binding in read_bindings(engine(NETWORKS["pair"]), fake_tensorrt))
