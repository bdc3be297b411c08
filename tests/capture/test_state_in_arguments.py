"""Calls that are given state: cache objects, and tensors that they update in place."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason
from graphcache.capture import torch_recorder
from graphcache.capture.trial_call import TrialCall
from graphcache.dispatch import targets
from graphcache.graphs.cpu_tape import CpuTape
from graphcache.keys.call_spec import CallSpec
from tests.effort import share
from tests.helpers import Fn, dispatcher_of, settled

SIZE = 4
PLACES = 8


@dataclass(eq=True)
class Cache:
    """Equal to others of the same contents, and not hashable: only its identity counts."""

    keys: Tensor = field(default_factory=lambda: torch.zeros(PLACES, SIZE))
    layers: list[Tensor] = field(default_factory=lambda: [torch.zeros(PLACES, SIZE)])
    length: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    scale: float = 1.0

    def tensors(self) -> list[Tensor]:
        return [self.keys, *self.layers, self.length]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(SIZE, 2 * SIZE).requires_grad_(False)

    def forward(self, x: Tensor, cache: Cache) -> dict[str, Any]:
        key, value = self.project(x).chunk(2, -1)
        place = (cache.length % PLACES)[None]
        cache.keys.index_copy_(0, place, key)
        cache.layers[0][place] = value
        cache.length.add_(1)
        return {"y": torch.softmax(x @ cache.keys.t(), -1) @ cache.layers[0] * cache.scale, "cache": cache}


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return x * 1.0


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Pair:
    """A module behind ``wrap`` and its twin, each with a cache of its own."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        module = Attention()
        self.twin = copy.deepcopy(module)
        self.fast = graphcache.wrap(module, **options)

    def step(self, cache: Cache, twin: Cache, x: Tensor | None = None, y: Tensor | None = None) -> None:
        x = torch.randn(1, SIZE) if x is None else x
        answer, wanted = self.fast(x, cache), self.twin(x if y is None else y, twin)
        assert answer["cache"] is cache
        assert torch.equal(answer["y"], wanted["y"])
        assert all(map(torch.equal, cache.tensors(), twin.tensors()))

    def steps(self, count: int, cache: Cache, twin: Cache) -> None:
        for _ in range(count):
            self.step(cache, twin)


def counts(fast: CachedModule) -> tuple[int, int, dict[Reason, int]]:
    """Captures and hits of the whole, and its eager calls by reason."""
    captures = dispatcher_of(fast).captures
    return fast.ledger.captures, captures.hits, dict(fast.ledger.eager)


# ---- objects


def test_one_capture_for_each_cache_object_and_then_hits() -> None:
    pair = Pair()
    caches, twins = [Cache(), Cache()], [Cache(), Cache()]
    for step in range(40):
        pair.step(caches[step % 2], twins[step % 2])
        if step == 21:
            for each in (*caches[0].tensors(), *twins[0].tensors()):
                each.zero_()
    assert counts(pair.fast) == (2, 36, {Reason.NEW_STATE: 2})


def test_a_cache_that_is_filled_by_its_first_call_is_captured_by_the_next() -> None:
    class Lazy:
        keys: Tensor | None = None

    def forward(_: Any, x: Tensor, cache: Lazy) -> Tensor:
        if cache.keys is None:
            cache.keys = torch.zeros(SIZE)
        return x + cache.keys.add_(1)

    fast, cache = graphcache.wrap(Fn(forward)), Lazy()
    for step in range(1, 7):
        assert torch.equal(fast(torch.zeros(SIZE), cache), torch.full((SIZE,), float(step)))
    assert counts(fast) == (1, 4, {Reason.NEW_STATE: 1})


CHANGES: dict[str, Any] = {
    "a plain attribute": lambda cache: setattr(cache, "scale", cache.scale + 1),
    "another tensor": lambda cache: setattr(cache, "keys", cache.keys * 2),
    "other memory": lambda cache: setattr(cache.keys, "data", cache.keys * 2),
    "an item": lambda cache: cache.layers.__setitem__(0, cache.layers[0] * 2),
    "its class": lambda cache: setattr(cache, "__class__", type("Other", (Cache,), {"scale": 3.0})),
    "its attributes": lambda cache: setattr(cache, "__dict__", {**vars(cache), "scale": 5.0}),
    "values": lambda cache: cache.keys.add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_object_is_noticed(name: str) -> None:
    pair, cache, twin = Pair(), Cache(), Cache()
    pair.steps(4, cache, twin)
    for each in (cache, twin):
        CHANGES[name](each)
    pair.steps(4, cache, twin)
    assert pair.fast.cache_info().captures == (1 if name == "values" else 2)


def test_a_graph_goes_with_its_object() -> None:
    pair, cache, twin = Pair(), Cache(), Cache()
    pair.steps(4, cache, twin)
    gone = weakref.ref(cache), weakref.ref(cache.keys)
    del cache
    assert gone[0]() is None
    pair.steps(1, other := Cache(), twin := Cache())
    assert gone[1]() is None
    pair.steps(3, other, twin)
    assert counts(pair.fast) == (2, 4, {Reason.NEW_STATE: 2})
    assert pair.fast.cache_info().graphs == 1


def test_whoever_makes_a_new_object_for_each_call_has_no_graph_of_the_whole() -> None:
    pair = Pair()
    for _ in range(6):
        pair.steps(1, Cache(), Cache())
    assert counts(pair.fast) == (0, 0, {Reason.NEW_STATE: 3, Reason.ARGUMENT: 3})
    assert sum(part.cache_info().hits for part in pair.fast.parts.values())


def test_objects_that_are_only_read() -> None:
    @dataclass
    class Options:
        scale: Tensor
        times: int = 2

    fast = graphcache.wrap(Fn(lambda _, x, options: x * options.scale * options.times))
    options = Options(torch.tensor(2.0))
    for step in range(6):
        assert fast(torch.ones(2), options).tolist() == [4.0 + step] * 2
        options.scale.add_(0.5)
    assert counts(fast) == (1, 4, {Reason.NEW_STATE: 1})
    options.times = 3
    assert fast(torch.ones(2), options=options).tolist() == [15.0] * 2


@pytest.mark.parametrize("make", [lambda: iter(()), lambda: type("Slots", (), {"__slots__": ()})(), lambda: len])
def test_what_cannot_be_held_weakly_or_seen_is_refused(make: Any) -> None:
    fast, value = graphcache.wrap(Fn(lambda _, x, value: x + 1)), make()
    for _ in range(3):
        assert fast(torch.zeros(1), value).item() == 1
    assert counts(fast) == (0, 0, {Reason.ARGUMENT: 3})


def test_in_the_background_nothing_that_calls_share_is_used() -> None:
    pair, cache, twin = Pair(capture_in="background"), Cache(), Cache()
    with pair.fast:
        pair.steps(5, cache, twin)
        assert counts(pair.fast) == (0, 0, {Reason.ARGUMENT: 5})


def test_an_object_in_words() -> None:
    assert str(CallSpec.of((Cache(), torch.zeros(2)), {})) == "args[0]: an object of type Cache, args[1]: float32[2]"


# ---- tensors


def updates(_: Any, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    kept.mul_(0.5).add_(x[: kept.shape[0]])
    return x * 2 + kept.sum(), kept


def test_a_tensor_that_is_updated_is_used_where_it_is() -> None:
    fast, kept, twin = graphcache.wrap(Fn(updates)), torch.zeros(SIZE), torch.zeros(SIZE)
    for _ in range(10):
        x = torch.randn(SIZE)
        answer, given_back = fast(x, kept)
        assert torch.equal(answer, updates(None, x, twin)[0])
        assert torch.equal(kept, twin)
        assert given_back is kept
    assert counts(fast) == (1, 9, {})


def test_other_tensors_have_graphs_of_their_own_once_they_come_again() -> None:
    fast, kept = graphcache.wrap(Fn(updates), strategy="whole_graph"), [torch.zeros(SIZE) for _ in range(3)]
    twins = [each.clone() for each in kept]
    for step in range(18):
        x = torch.randn(SIZE)
        assert torch.equal(fast(x, kept[step % 3])[0], updates(None, x, twins[step % 3])[0])
        assert all(map(torch.equal, kept, twins))
    assert counts(fast) == (3, 13, {Reason.NEW_STATE: 2})


def test_new_tensors_for_each_call_run_eagerly() -> None:
    fast, kept = graphcache.wrap(Fn(updates)), [torch.full((SIZE,), float(value)) for value in range(9)]
    for value, each in enumerate(kept):
        wanted = torch.full((SIZE,), float(value))
        x = torch.randn(SIZE)
        assert torch.equal(fast(x, each)[0], updates(None, x, wanted)[0])
        assert torch.equal(each, wanted)
    assert counts(fast) == (1, 0, {Reason.NEW_STATE: 3, Reason.MUTATES: 5})


def test_inputs_in_the_memory_that_is_updated() -> None:
    """A graph that copies its inputs first would miss what the update makes of them."""

    def reads_after(_: Any, x: Tensor, kept: Tensor) -> Tensor:
        kept.add_(1)
        return x * 1.0

    fast, kept = graphcache.wrap(Fn(reads_after)), torch.zeros(2 * SIZE)
    twin = kept.clone()
    for part in (slice(0, SIZE), slice(SIZE, None), None):
        for _ in range(4):
            apart = torch.randn(SIZE)
            x, y = (apart if part is None else each[part] for each in (kept, twin))
            assert torch.equal(fast(x, kept), reads_after(None, y, twin))
            assert torch.equal(kept, twin)
    assert fast.cache_info().hits >= 6


def test_inputs_in_state_of_the_module() -> None:
    module = Counting()
    fast = graphcache.wrap(module)
    for step in range(1, 13):
        alias = module.state.detach() if step % 3 == 0 else module.state.view(SIZE) if step > 6 else None
        answer = fast(torch.full((SIZE,), -1.0) if alias is None else alias)
        assert answer.tolist() == [-1.0 if alias is None else float(step)] * SIZE
    assert fast.cache_info().hits > 6


@pytest.mark.parametrize("place", ["attribute", "list", "object"])
@pytest.mark.parametrize("capture_in", ["foreground", "background"])
def test_a_module_that_keeps_what_it_is_given_has_the_callers_tensor(place: str, capture_in: Any) -> None:
    class Box:
        kept: Any = None

    def forward(self: Any, x: Tensor, box: Any) -> Tensor:
        if place == "attribute":
            self.last = x
        elif place == "list":
            self.all[0] = x
        else:
            (box or self.box).kept = x
        return x + 1

    module = Fn(forward, all=[None], last=None, box=Box())
    given: Any = Box() if place == "object" and capture_in == "foreground" else None
    with graphcache.wrap(module, capture_in=capture_in) as fast:
        for x in [torch.zeros(3)] * 8 + [torch.ones(3)] * 8:
            assert torch.equal(fast(x, given), x + 1)
            settled(fast)
            kept = {"attribute": module.last, "list": module.all[0], "object": (given or module.box).kept}[place]
            assert kept is x
            x.add_(1)


def test_a_module_that_only_holds_what_it_is_given_is_captured() -> None:
    module = Fn(lambda _, x: x * 2)
    module.observation = torch.zeros(3)
    fast = graphcache.wrap(module)
    for step in range(5):
        module.observation.fill_(step)
        assert fast(module.observation).tolist() == [2.0 * step] * 3
    assert counts(fast) == (1, 4, {})


def test_state_behind_methods_of_an_object_that_is_given() -> None:
    def make() -> Any:
        kept = [1.0]
        return type("Given", (), {"read": lambda self, kept=kept: kept})()

    def forward(_: Any, x: Tensor, given: Any) -> Tensor:
        given.read()[0] += 1
        return x * given.read()[0]

    fast, given, twin = graphcache.wrap(Fn(forward)), make(), make()
    for _ in range(8):
        assert torch.equal(fast(torch.ones(2), given), forward(None, torch.ones(2), twin))
        assert given.read() == twin.read()


# ---- faults

FAULTS: dict[str, tuple[Any, str]] = {
    "the first trial": (TrialCall, "run"),
    "the comparison": (TrialCall, "compare"),
    "the recording": (CpuTape, "record"),
    "the verification": (torch_recorder, "verify"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_recording_that_fails_leaves_the_state_as_after_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("made up")

    pair, cache, twin = Pair(), Cache(), Cache()
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[name], fails)
        pair.steps(3, cache, twin)
    assert not pair.fast.cache_info().captures
    pair.steps(20, cache, twin)
    assert pair.fast.cache_info().captures


# ---- anything


@settings(max_examples=share(300, 40))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step"] * 6 + ["alias", "reset", "new", "replaced", "changed", "cleared"]),
            st.integers(0, 2),
        ),
        max_size=40,
    )
)
def test_any_order_of_calls_and_changes(actions: list[tuple[str, int]]) -> None:
    with torch.no_grad():
        pair = Pair(max_graphs=2)
        caches = [[Cache(), Cache()] for _ in range(3)]
        for what, index in actions:
            mine, other = caches[index]
            if what == "step":
                pair.step(mine, other)
            elif what == "alias":
                pair.step(mine, other, mine.layers[0][:1], other.layers[0][:1])
            elif what == "new":
                caches[index] = [Cache(), Cache()]
            elif what == "cleared":
                pair.fast.clear()
            for each in (mine, other):
                if what == "reset":
                    for tensor in each.tensors():
                        tensor.zero_()
                elif what == "replaced":
                    each.keys = each.keys.clone()
                elif what == "changed":
                    each.scale += 1
        assert len(dispatcher_of(pair.fast).entries) <= 2


def test_a_graph_of_a_tensor_where_it_is_never_answers_for_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is known, or forgotten, of what calls update."""

    monkeypatch.setattr(targets, "_MAX_UPDATES", 1)
    module, fast = (made := Counting()), graphcache.wrap(made)
    for step in range(60):
        total = step + 1
        if step % 20 == 10:
            module.state = torch.full((SIZE,), float(step))
        alias = step % 7 in (3, 4) or step % 20 in (10, 11)
        x = module.state.detach() if alias else torch.full((SIZE,) if step % 2 else (2, SIZE), -1.0)
        answer = fast(x)
        assert answer.unique().tolist() == [float(total) if alias else -1.0], step
        assert module.state.tolist() == [float(total)] * SIZE
    assert fast.cache_info().hits > 10
