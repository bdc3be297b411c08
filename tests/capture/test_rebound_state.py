"""Calls that put other tensors into attributes are captured, and leave there what eager calls leave."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.capture import rebound_state, torch_recorder
from graphcache.errors import CaptureError
from graphcache.modules.transparent import dispatcher_of
from tests.helpers import Fn

SIZE = 4


class Gru(nn.Module):
    def __init__(self, where: str = "attribute") -> None:
        super().__init__()
        self.cell = nn.GRUCell(SIZE, SIZE)
        if where == "buffer":
            self.register_buffer("h", torch.zeros(1, SIZE))
        else:
            self.h: Any = torch.zeros(1, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        return self.h * 2


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(SIZE, SIZE)
        self.h = (torch.zeros(1, SIZE), torch.zeros(1, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        return self.h[0]


class Outer(nn.Module):
    """Its state is a part's, and an object's."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.box = Gru(), Box()

    @property
    def h(self) -> tuple[Tensor, Tensor]:
        return self.part.h, self.box.h

    @h.setter
    def h(self, value: tuple[Tensor, Tensor]) -> None:
        self.part.h, self.box.h = value

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        self.box.h = self.box.h * 0.5 + y
        return y + self.box.h


class Layers(nn.Module):
    """Its state is the items of a list and of a dictionary, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(SIZE, SIZE) for _ in range(2)])
        self.items, self.table = [torch.zeros(1, SIZE), torch.zeros(1, SIZE)], {"h": torch.zeros(1, SIZE), "n": 1}
        self.recent = [torch.zeros(1, SIZE)]

    @property
    def h(self) -> tuple[Any, ...]:
        return (*self.items, self.table["h"], *self.recent)

    @h.setter
    def h(self, value: tuple[Any, ...]) -> None:
        self.items[:], self.table["h"], self.recent = value[:2], value[2], [value[3]]

    def forward(self, x: Tensor) -> Tensor:
        for index, cell in enumerate(self.cells):
            x = self.items[index] = cell(x, self.items[index])
        self.table["h"] = self.table["h"] * 0.5 + x
        self.recent = [self.recent[0] + self.table["h"]]
        return x + self.recent[0]


class Box:
    def __init__(self) -> None:
        self.h = torch.zeros(1, SIZE)


MODELS: dict[str, Callable[[], Any]] = {
    "attribute": Gru,
    "buffer": lambda: Gru("buffer"),
    "tuple": Lstm,
    "part and object": Outer,
    "lists and a dictionary": Layers,
}


def leaves(value: Any) -> list[Tensor]:
    return [each for item in value for each in leaves(item)] if isinstance(value, tuple) else [value]


def same(one: Any, other: Any) -> bool:
    return all(map(torch.equal, leaves(one.h), leaves(other.h)))


def pair(name: str, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    module = MODELS[name]().requires_grad_(False)
    return graphcache.wrap(module, **options), module, copy.deepcopy(module)


def rows(step: int) -> Tensor:
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(step))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_hits_leave_the_state_of_eager_calls(name: str, mode: Any) -> None:
    with mode():
        fast, module, twin = pair(name)
        for step in range(30):
            assert torch.equal(fast(rows(step)), twin(rows(step)))
            assert same(module, twin), step
            if step == 10:
                for each in (module, twin):
                    each.h = torch.utils._pytree.tree_map(torch.ones_like, each.h)
            if step == 20:
                fast.clear()
        info = fast.cache_info()
    assert info.eager == {Reason.UNSETTLED: 1}
    # The first state was made outside of inference mode, where a deep copy is the same.
    assert (info.captures, info.hits) == (2, 27)


def test_a_state_is_an_object_of_its_own_after_every_call() -> None:
    fast, module, twin = pair("tuple")
    kept, copies = [], []
    for step in range(6):
        answer, wanted = fast(rows(step)), twin(rows(step))
        assert answer is module.h[0], "as eagerly"
        kept.append(module.h)
        copies.append(copy.deepcopy(module.h))
        if step == 3:
            answer.zero_(), wanted.zero_()
            copies[-1] = copy.deepcopy(module.h)
        assert same(module, twin)
    for one, other in zip(kept, copies, strict=True):
        assert all(map(torch.equal, one, other)), "later calls leave earlier states alone"


def test_a_sequence_that_begins_with_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.h = x if self.h is None else self.h * 0.5 + x
        return self.h + 1

    module = Fn(forward, h=None)
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for sequence in range(4):
        for step in range(6):
            assert torch.equal(fast(rows(step)), twin(rows(step)))
            assert torch.equal(module.h, twin.h), (sequence, step)
        module.h = twin.h = None
    info = fast.cache_info()
    assert info.captures == 2
    assert info.hits > 18


def test_an_attribute_that_is_deleted_and_comes_back() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.h = getattr(self, "h", x) * 0.5 + x
        return self.h + 1

    module = Fn(forward)
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for _ in range(4):
        for step in range(5):
            assert torch.equal(fast(rows(step)), twin(rows(step)))
            assert torch.equal(module.h, twin.h)
        del module.h, twin.h
    assert fast.cache_info().hits > 0


def test_another_object_with_the_state() -> None:
    fast, module, twin = pair("part and object")
    for step in range(24):
        assert torch.equal(fast(rows(step)), twin(rows(step)))
        assert same(module, twin)
        if step % 6 == 5:
            module.box, twin.box = Box(), Box()
    assert fast.cache_info().hits > 8


def test_one_item_of_a_long_list() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.items[300] = self.items[300] * 0.5 + x
        self.table["".join(["a", "b"])] = self.items[300] * 2
        return self.table["ab"] + 1

    module = Fn(forward, items=[torch.zeros(1, SIZE) for _ in range(301)], table={"ab": torch.zeros(1, SIZE)})
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for step in range(8):
        assert torch.equal(fast(rows(step)), twin(rows(step)))
        assert torch.equal(module.items[300], twin.items[300])
        assert torch.equal(module.table["ab"], twin.table["ab"])
        if step == 5:
            del module.items[:5], twin.items[:5]
            module.items[295:], twin.items[295:] = [[torch.ones(1, SIZE) for _ in range(6)] for _ in range(2)]
    info = fast.cache_info()
    assert (info.captures, info.hits) == (2, 5)


def test_objects_that_are_replaced_are_not_kept() -> None:
    fast, module, _ = pair("part and object")
    for step in range(4):
        fast(rows(step))
    before, alive = weakref.ref(module.box), weakref.ref(module.box.h)
    module.box = Box()
    for step in range(4):
        fast(rows(step))
    gc.collect()
    assert before() is None
    assert alive() is None


def test_state_that_is_replaced_too_often_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebound_state, "_MOST", 3)
    fast, module, twin = pair("part and object")
    for step in range(20):
        assert torch.equal(fast(rows(step)), twin(rows(step)))
        assert same(module, twin)
        module.box, twin.box = Box(), Box()
    assert Reason.MUTATES in fast.cache_info().eager


def test_an_ignored_counter_beside_the_state() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.h = self.h + x
        return self.h * 2

    module = Fn(forward, h=torch.zeros(1, SIZE), count=0)
    fast, twin = graphcache.wrap(module, ignore=["self.count"]), copy.deepcopy(module)
    for step in range(6):
        assert torch.equal(fast(rows(step)), twin(rows(step)))
        assert torch.equal(module.h, twin.h)
    assert fast.cache_info().hits == 4


def test_state_that_grows_runs_eagerly() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.h = self.h + x if self.count < 4 else torch.cat([self.h, x])
        return self.h * 2

    module = Fn(forward, h=torch.zeros(1, SIZE), count=0)
    fast, twin = graphcache.wrap(module, ignore=["self.count"]), copy.deepcopy(module)
    for step in range(10):
        module.count = twin.count
        assert torch.equal(fast(rows(step)), twin(rows(step)))
        assert torch.equal(module.h, twin.h)
    assert fast.cache_info().captures <= 2


def test_training_and_evaluation_in_turn() -> None:
    fast, module, twin = pair("attribute")
    module.requires_grad_(True), twin.requires_grad_(True)
    for turn in range(3):
        for step in range(5):
            with torch.set_grad_enabled(turn == 1):
                one, other = fast(rows(step)), twin(rows(step))
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad
            assert module.h.requires_grad == twin.h.requires_grad
            assert same(module, twin)
        module.h, twin.h = module.h.detach(), twin.h.detach()
    assert fast.cache_info().hits > 0


def test_a_call_that_raises_leaves_what_an_eager_one_leaves() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.h = self.h + x
        if self.h.shape[0] > 1:
            raise ValueError("too many rows")
        return self.h * 2

    module = Fn(forward, h=torch.zeros(1, SIZE))
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for x in (rows(0), rows(1), rows(2), torch.ones(3, SIZE), rows(3)):
        for each in (fast, twin):
            if len(x) == 3:
                with pytest.raises(ValueError, match="too many rows"):
                    each(x)
            elif each.h.shape[0] == 1 if each is twin else module.h.shape[0] == 1:
                each(x)
        assert torch.equal(module.h, twin.h)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_recording_that_fails_leaves_the_state_as_after_one_call(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, module, twin = pair("attribute")
    fast(rows(0)), twin(rows(0))
    original, runs = torch_recorder.TrialCall.repeat, 0

    def fails(self: Any) -> Any:
        nonlocal runs
        runs += 1
        answer = original(self)
        if runs == at:
            raise RuntimeError("made up")
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(torch_recorder.TrialCall, "repeat", fails)
        assert torch.equal(fast(rows(1)), twin(rows(1)))
    assert same(module, twin)
    assert torch.equal(fast(rows(2)), twin(rows(2)))
    assert same(module, twin)


def test_no_thread_takes_the_tensors_of_a_recording_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # The function below reaches graphcache itself.
    fast, module, twin = pair("attribute", ignore=["*look*"])
    fast(rows(0)), twin(rows(0))
    target: Any = dispatcher_of(fast).target
    original, before, seen = target.call.run, module.h, []

    def look(*args: Any) -> Any:
        if sys.getprofile() is not None:
            # The observed run, where a thread would be an effect.
            return original(*args)
        thread = threading.Thread(target=lambda: seen.append((target.describe(args, {}).tensors[-1], module.h)))
        thread.start()
        thread.join()
        return original(*args)

    monkeypatch.setattr(target.call, "run", look)
    fast(rows(1)), twin(rows(1))
    assert all(each is before for each, _ in seen)
    assert any(there is not before for _, there in seen)
    assert same(module, twin)


def test_sessions_are_refused() -> None:
    fast, module, _ = pair("attribute")
    for step in range(3):
        fast(rows(step))
    before = module.h
    with pytest.raises(CaptureError, match="other tensors into attributes"):
        fast.session(rows(0))
    assert module.h is before


def test_answers_into_memory_of_the_caller() -> None:
    fast, module, twin = pair("attribute")
    out = torch.zeros(1, SIZE)
    for step in range(6):
        fast.forward_into(out, rows(step))
        assert torch.equal(out, twin(rows(step)))
        assert same(module, twin)


def test_captures_for_nobody_leave_the_state_alone() -> None:
    fast, module, twin = pair("attribute")
    for step in range(3):
        fast(rows(step)), twin(rows(step))
    fast.clear()
    assert fast.try_capture(rows(0)) is None
    assert same(module, twin)
    assert torch.equal(fast(rows(3)), twin(rows(3)))
    assert fast.cache_info().hits == 2


def test_copies_pickles_and_manifests(tmp_path: Any) -> None:
    fast, module, twin = pair("attribute")
    for step in range(4):
        fast(rows(step)), twin(rows(step))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same(other, twin)
        assert torch.equal(other(rows(9)), copy.deepcopy(twin)(rows(9)))
    fast.save_manifest(tmp_path / "manifest.json")
    again = graphcache.wrap(copy.deepcopy(module))
    again.prepare(tmp_path / "manifest.json")
    assert torch.equal(again(rows(9)), copy.deepcopy(twin)(rows(9)))
