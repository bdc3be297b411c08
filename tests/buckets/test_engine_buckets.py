"""Engines whose calls are padded, over the stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphcache
from graphcache import Buckets, Mask, Reason
from graphcache.buckets import padder, padding
from graphcache.buckets.padder import engine_buckets
from graphcache.errors import ConfigError, InputCountError, InputDtypeError, ProfileRangeError
from tests.effort import share
from tests.engine_modules import MODULES, load, prepare, rows
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import outcomes, wrap_recorded


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    # What padding allocates lies on the device too.
    with installed(*MODULES, padder, padding, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


def test_a_padded_call_hits(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), buckets={"x": {0: [2, 4, 16]}})
    for count in (3, 1, 3, 4, 2, 1, 3):
        x = rows(fake, count, count)
        kept = x.clone()
        assert torch.equal(fast(x), x * 3 + 1)
        assert torch.equal(x, kept)
    assert outcomes(fast) == (5, 2, {})
    assert fast.cache_info().padded == 3
    for count in (9, 12, 16):
        assert torch.equal(fast(x=rows(fake, count)), rows(fake, count) * 3 + 1)
    assert outcomes(fast) == (7, 3, {}), "of the other profile"
    fast.close()
    fast.module.close()
    assert fake.driver.leaked() == {}


@settings(deadline=None, max_examples=share(15, 6), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=8),
    st.sampled_from(["bind", "copy"]),
    st.sampled_from([{"a": {0: "rows", 1: "columns"}}, {0: {0: "rows", 1: "columns"}}]),
)
def test_two_inputs_of_two_axes_whatever_the_sizes(fake: Torch, steps: Any, io: str, where: Any) -> None:
    sizes = {"rows": [2, 6, 12], "columns": "powers_of_two"}
    axes = {axis: {"sizes": sizes[name], "name": name} for axis, name in next(iter(where.values())).items()}
    fast = wrap_recorded(load("pair"), io=io, buckets={next(iter(where)): axes, "b": axes}, max_graphs=3)
    heap = fake.driver.heap
    with fake.on(fake.new_stream()):
        for count, width, start in steps:
            a = heap.tensor(torch.arange(start, start + count * width).reshape(count, width))
            b = heap.tensor(a * 2 + 1)
            got = fast(a, b=b)
            assert isinstance(got, tuple)
            assert torch.equal(got[0], a + b)
            assert torch.equal(got[1], a * b)
            assert got[1].is_contiguous()
    assert fast.cache_info().eager == {}
    fast.close()
    fast.module.close()


def test_host_shape_tensors_are_left_alone(fake: Torch) -> None:
    fast = graphcache.wrap(load("head"), buckets={"x": {1: [4]}})
    x = rows(fake, 16, -10)
    for _ in range(2):
        for n in (3, 9):
            assert torch.equal(fast(x, torch.tensor([n])), x[:n].relu())
    assert outcomes(fast) == (2, 2, {})
    with pytest.raises(ConfigError, match=r"^buckets\['stop'\]: head reads 'stop' on the host"):
        graphcache.wrap(load("head"), buckets={"stop": {0: [1]}})


def test_axes_that_go_together_must_be_said_to(fake: Torch) -> None:
    fast = graphcache.wrap(load("pair"), buckets={"a": {0: [4]}, "b": {0: [4]}})
    for _ in range(3):
        x = rows(fake, 3)
        assert torch.equal(fast(x, x)[0], x + x)
    assert fast.cache_info().eager == {Reason.PADDING: 1}
    assert (fast.cache_info().hits, fast.cache_info().padded) == (1, 0)


def test_what_the_engine_refuses_it_refuses(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), buckets={"x": {0: [4, 16]}})
    fast(rows(fake, 3))
    fast(rows(fake, 10))
    for _ in range(2):
        with pytest.raises(ProfileRangeError, match=r"input 'x' of affine has shape \(6, 4\)"):
            fast(rows(fake, 6))
        with pytest.raises(InputDtypeError):
            fast(torch.zeros(3, 4, dtype=torch.float64))
        with pytest.raises(InputCountError):
            fast()
    assert fast.cache_info().graphs == 2


def test_a_profile_that_was_chosen_later_holds_for_the_bucket(fake: Torch) -> None:
    fast = graphcache.wrap(load("overlapping"), buckets={"x": {0: [10]}})
    x = fake.driver.heap.tensor([1.0] * 6)
    for _ in range(2):
        assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().padded == 1
    fast.module.set_optimization_profile(0)
    for _ in range(3):
        assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().padded == 1, "10 lies outside profile 0"
    assert fast.cache_info().eager == {Reason.PADDING: 1}
    fast.module.set_optimization_profile(None)
    for _ in range(2):
        assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().padded >= 2


def test_new_weights_are_seen(fake: Torch) -> None:
    fast = graphcache.wrap(load("refittable"), buckets={"x": {0: [4]}})
    x = fake.driver.heap.tensor([[1.0, 2.0]] * 3)
    for _ in range(2):
        assert torch.equal(fast(x), x * torch.tensor([2.0, 3.0]) + 1)
    fast.module.refit({"shift": torch.tensor([5.0, 5.0])})
    for _ in range(2):
        assert torch.equal(fast(x), x * torch.tensor([2.0, 3.0]) + 5)
    assert fast.cache_info().padded == 2


@pytest.mark.parametrize("network", ["conditional", "unsteady"])
def test_what_cannot_be_captured_or_verified_runs_as_it_is(fake: Torch, network: str) -> None:
    fast = graphcache.wrap(load(network), buckets={"x": {0: [4]}})
    x = fake.driver.heap.tensor([1.0, -5.0, 2.0])
    for _ in range(3):
        got = fast(x)
        assert got.shape == (3,)
        if network == "conditional":
            assert torch.equal(got, -x)
    assert fast.cache_info().padded == 0
    assert sum(fast.cache_info().eager.values()) == 3


def test_an_output_allocator_forbids_nothing_else(fake: Torch) -> None:
    fast = graphcache.wrap(load("positive"), buckets={"x": {0: [4]}})
    for values in ([1.0, -1.0, 2.0], [-1.0, 3.0, 4.0], [3.0, -4.0]):
        x = fake.driver.heap.tensor(values)
        assert torch.equal(fast(x), x[x > 0])
    assert fast.cache_info().padded == 0


@pytest.mark.parametrize(
    ("network", "buckets", "message"),
    [
        (
            "affine",
            {"x": {0: [2, 6]}},
            r"^buckets\['x'\]\[0\]: the size 6; expected one that a profile takes: 1\.\.4, 8",
        ),
        ("affine", {"x": {-1: [8]}}, r"^buckets\['x'\]\[-1\]: the size 8; expected one that a profile takes: 4, 4$"),
        ("affine", {"x": {2: [4]}}, r"^buckets\['x'\]\[2\]: the argument has 2 dimensions"),
        ("affine", {0: {0: [17]}}, r"^buckets\[0\]\[0\]: the size 17; expected one"),
        ("affine", {"y": {0: [4]}}, r"^buckets\['y'\]: no argument has this name; expected one of \['x'\]"),
        ("affine", {3: {0: [4]}}, r"^buckets\[3\]: there are 1 positional arguments"),
        ("affine", {"x": {0: [4]}, "m": Mask(["x[0]"])}, r"^buckets\['m'\]: no argument has this name"),
    ],
)
def test_buckets_that_the_engine_cannot_have(fake: Torch, network: str, buckets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphcache.wrap(load(network), buckets=buckets)


def test_of_the_powers_of_two_those_that_fit(fake: Torch) -> None:
    given_buckets = Buckets({"x": {0: "powers_of_two"}}, outputs={0: {0: "x[0]"}})
    found = engine_buckets(given_buckets, load("affine"))
    assert found.sizes == {"x[0]": (1, 2, 4, 8, 16)}
    assert found.outputs == given_buckets.outputs
    assert len(given_buckets.sizes["x[0]"]) == 31
    nothing = Buckets({"x": {1: "powers_of_two"}})
    assert engine_buckets(nothing, load("affine")).sizes == {"x[1]": (4,)}


def test_names_that_are_no_identifiers(fake: Torch) -> None:
    named = padder.Padder(Buckets({"input.1": {0: [4]}}, outputs={0: {0: "input.1[0]"}}), ["mask:0", "input.1"])
    fit = named.fit((torch.ones(1), torch.ones(3)), {})
    assert not isinstance(fit, str)
    args, kwargs = named.pad(fit, (torch.ones(1), torch.ones(3)), {})
    assert ([tuple(each.shape) for each in args], kwargs) == ([(1,), (4,)], {})
    with pytest.raises(ConfigError, match=r"expected one of \['a b', 'input\.1'\]"):
        padder.Padder(Buckets({"x": {0: [4]}}), ["a b", "input.1"])
