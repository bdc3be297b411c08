"""Asking TensorRT for the rules of output shapes, over the stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graphcache.engines import context, engine, library
from graphcache.engines import output_shapes as probe
from graphcache.engines.engine import Engine
from graphcache.engines.output_shapes import Size, output_shapes
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IO, NETWORKS, IExecutionContext, Network, serialize
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(context, engine, library, probe, patch=monkeypatch) as fake:
        fake_tensorrt.use(monkeypatch)
        monkeypatch.setattr(fake_tensorrt, "device", fake.driver)
        yield fake


ROWS = Size(((1, ((0, 0),)),))


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        ("affine", [(ROWS, Size(plus=4))]),
        ("pair", [(ROWS, Size(((1, ((0, 1),)),)))] * 2),
        ("head", [(None, Size(plus=4))]),
        ("positive", [(None,)]),
        ("length", [(ROWS,), (Size(plus=1),)]),
        ("overlapping", [(ROWS,)]),
        ("scalar", [(ROWS,)]),
    ],
)
def test_the_networks(fake: Torch, network: str, wanted: list[Any]) -> None:
    assert list(output_shapes(Engine(serialize(network))).outputs) == wanted


def of(shapes: Callable[[dict[str, Any]], tuple[int, ...]], ranges: tuple[Any, Any], rank: int = 1) -> Network:
    return Network(
        (
            IO("x", True, (-1,) * len(ranges[0]), ranges=((ranges[0], ranges[0], ranges[1]),)),
            IO("y", False, (-1,) * rank),
        ),
        lambda given, _: {"y": shapes(given)},
        lambda given: {"y": given["x"]},
    )


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (lambda given: (given["x"][0] * given["x"][1],), (100, 7)),
        (lambda given: (given["x"][0] + given["x"][1] + 3,), (100, 7)),
        (lambda given: ((given["x"][1] + 1) // 2,), (3, 901)),
        (lambda given: (4 * given["x"][0],), (123, 1)),
    ],
)
def test_rules_beyond_what_was_asked(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, rule: Callable[..., Any], shape: tuple[int, int]
) -> None:
    monkeypatch.setitem(NETWORKS, "made", of(rule, ((1, 1), (512, 1024))))
    (found,) = output_shapes(Engine(serialize("made"))).of([shape])
    assert found == rule({"x": shape})


def broadcast(one: int, other: int) -> int:
    if one != other and 1 not in (one, other):
        raise ValueError(f"{one} and {other} do not go together")
    return other if one == 1 else one


def joined(names: str, high: int = 32) -> Network:
    """Inputs with two axes each, of the same range, that are broadcast against each other."""

    def shapes(given: dict[str, Any], _: Any) -> dict[str, tuple[int, ...]]:
        found = given[names[0]]
        for name in names[1:]:
            found = tuple(map(broadcast, found, given[name]))
        return {"y": found}

    ranges = (((1, 1), (2, 2), (high, high)),)
    io = [IO(name, True, (-1, -1), ranges=ranges) for name in names]
    return Network((*io, IO("y", False, (-1, -1))), shapes, lambda given: {"y": given[names[0]]})


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_inputs_that_are_added_have_the_same_sizes(fake: Torch, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    monkeypatch.setitem(NETWORKS, "made", joined(names))
    found = output_shapes(Engine(serialize("made")))
    assert found.outputs == ((ROWS, Size(((1, ((0, 1),)),))),)
    assert found.of([(700, 9)] * len(names)) == [(700, 9)]


def test_a_rule_that_is_none_of_them(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "made", of(lambda given: (given["x"][0] ** 2,), ((1,), (64,))))
    assert output_shapes(Engine(serialize("made"))).outputs == ((None,),)


def test_where_tensorrt_refuses_all(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: dict[str, Any]) -> tuple[int, ...]:
        raise ValueError("no shapes go together")

    monkeypatch.setitem(NETWORKS, "made", of(refuse, ((1,), (64,))))
    assert output_shapes(Engine(serialize("made"))).outputs == ((None,),)


def test_nothing_ran_and_no_context_is_left(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IExecutionContext, "execute_async_v3", lambda *_: pytest.fail("it ran"))
    before = len(IExecutionContext.made)
    output_shapes(Engine(serialize("pair")))
    assert len(IExecutionContext.made) == before
