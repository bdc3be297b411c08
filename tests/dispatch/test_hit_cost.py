"""What a hit does, counted instead of timed: the same on every machine, however busy it is.

Counted are the calls of Python functions of the package, and of C functions from them. Each costs some 30 to 100 ns,
which is what a hit consists of beside the launch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import native
from graphcache.graphs.cuda import IoSlot
from tests.engine_modules import Torch, fake, load, rows  # noqa: F401 - the fixture is used by its name
from tests.helpers import Fn, dispatcher_of, graphs_of, wrap_recorded

MOST_ON_THE_HOST = 55
"""For one plain tensor, with a graph of one operation and the compiled guard. 51 now."""

MOST_BEFORE_THE_GUARD_IS_COMPILED = 340
"""The same, with the 25 objects that the module reaches compared in Python. 333 now."""

MOST_OF_AN_ENGINE = 67
"""For an engine with one input and one output, in Python, on tensors whose memory comes again. 62 now."""

MOST_ON_OTHER_MEMORY = 68
"""The same on memory that was never used before. 63 now."""

MOST_INTO_THE_SAME_MEMORY = 95
"""Answering into the same tensor from the same tensor. 89 now."""

MOST_OF_A_BLOCK = 84
"""Entries of the native guard for a block of four submodules and four parameters. 80 now: nine tables, a set, the class
and the dictionary of each submodule, and its parameters. Each is read at every hit unless CPython tells of writes."""


def calls_of(call: Callable[[], object]) -> int:
    """How many functions are called by functions of the package."""
    count = 0

    def notice(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event in ("call", "c_call") and "/graphcache/" in frame.f_code.co_filename

    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def counted(fast: Any, *args: Tensor) -> int:
    """What a hit calls, once everything that a first hit makes is there."""
    for _ in range(3):
        fast(*args)
    before = fast.cache_info()
    found = calls_of(lambda: fast(*args))
    after = fast.cache_info()
    assert (after.hits, after.captures) == (before.hits + 1, before.captures)
    return found


def host(**options: Any) -> Any:
    return graphcache.wrap(Fn(lambda _, *values: values[0] + 1), max_graphs=400, **options)


@pytest.mark.parametrize("way", ["compiled", "python"])
def test_a_hit_costs_the_same_however_many_graphs_there_are(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, way: str
) -> None:
    if way == "compiled":
        guard = request.getfixturevalue("compiled").Guard
        monkeypatch.setattr(native, "guard_type", lambda: guard)
    few, many = host(), host()
    with torch.no_grad():
        for size in range(1, 301):
            many(torch.ones(size))
        alone, among = counted(few, torch.ones(7)), counted(many, torch.ones(7))
    assert len(graphs_of(many)) == 300
    assert alone == among <= (MOST_ON_THE_HOST if way == "compiled" else MOST_BEFORE_THE_GUARD_IS_COMPILED)


def test_each_further_input_costs_the_same() -> None:
    fast = host()
    with torch.no_grad():
        found = [counted(fast, *(torch.ones(2) for _ in range(count))) for count in (2, 3, 4, 16, 64)]
    step = found[1] - found[0]
    assert 0 < step <= 12
    assert found == [found[0] + (count - 2) * step for count in (2, 3, 4, 16, 64)]


def test_subscribers_and_verification_are_no_part_of_a_hit() -> None:
    heard: list[object] = []
    watched, bare = host(), host(verify=False)
    watched.subscribe(heard.append)
    with torch.no_grad():
        assert counted(watched, torch.ones(3)) == counted(bare, torch.ones(3))
    assert len(heard) == 1, "the capture alone"


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_a_hit_of_an_engine(fake: Torch, monkeypatch: pytest.MonkeyPatch, io: str) -> None:  # noqa: F811
    answers = itertools.cycle([rows(fake, 2), rows(fake, 2)])
    monkeypatch.setattr(IoSlot, "fresh", lambda _: next(answers))
    fast = wrap_recorded(load("affine"), io=io)
    inputs = [rows(fake, 2, start) for start in range(2)]
    out = fake.driver.heap.tensor(inputs[0] * 0)
    with torch.no_grad(), fake.on(fake.new_stream()):
        for _ in range(30):
            for x in inputs:
                fast(x)
        fake.driver.calls.clear()
        found = {calls_of(lambda x=x: fast(x)) for x in inputs * 4}  # type: ignore[misc]
        # Python points its one executable at other tensors each time, native code has further ones.
        nodes = 0 if fast._graphcache_table is not None else 1 if io == "bind" else 2
        setter = "cuGraphExecKernelNodeSetParams" if io == "bind" else "cuGraphExecMemcpyNodeSetParams"
        assert fake.driver.calls == [*[setter] * nodes, "cuGraphLaunch"] * 8
        assert torch.equal(fast(inputs[0]), inputs[0] * 3 + 1)
        for _ in range(3):
            fast.forward_into(out, inputs[0])
        into = calls_of(lambda: fast.forward_into(out, inputs[0]))
    assert len(found) == 1
    assert max(found) <= MOST_OF_AN_ENGINE
    assert into <= MOST_INTO_THE_SAME_MEMORY


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_a_hit_of_an_engine_on_other_memory(fake: Torch, io: str) -> None:  # noqa: F811
    fast = wrap_recorded(load("affine"), io=io)
    with torch.no_grad(), fake.on(fake.new_stream()):
        found = []
        for start in range(100):
            x = rows(fake, 2, start)
            found.append(calls_of(lambda x=x: fast(x)))  # type: ignore[misc]
            assert torch.equal(fast(x), x * 3 + 1)
    usual = sorted(found[50:])
    assert usual[len(usual) // 2] <= MOST_ON_OTHER_MEMORY
    assert len(set(usual)) <= 2


class Block(nn.Module):
    """Calls functions of a module of the user's, which read the same globals."""

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return self.second(self.act(self.first(x)))


def entries(blocks: int, functions: int) -> int:
    """How many entries the guard of a module has that calls these in each of its blocks."""
    made: dict[str, Any] = {"__name__": "users_module", "SCALE": 1.0, "FLAGS": {"a": [1]}}
    for number in range(functions):
        exec(f"def f{number}(x): return x * SCALE if FLAGS['a'] else x", made)
    found = [made[f"f{number}"] for number in range(functions)]
    fast = graphcache.wrap(nn.Sequential(*[Block(found) for _ in range(blocks)]).requires_grad_(False))
    for _ in range(3):
        fast(torch.ones(1, 4))
    known = dispatcher_of(fast).target.guard.known
    assert known is not None
    assert fast.cache_info().hits == 2
    return len(known.compared)


def test_what_a_guard_compares_grows_with_what_the_module_has_and_no_faster(
    compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "guard_type", lambda: compiled.Guard)
    few, many = entries(2, 1), entries(10, 1)
    assert (many - few) / 8 <= MOST_OF_A_BLOCK
    # A function and its attributes, not again the globals that others read too.
    assert entries(2, 21) - few <= 2 * 20
