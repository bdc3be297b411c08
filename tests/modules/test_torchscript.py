"""TorchScript modules behind wrap: scripted, traced, frozen, loaded, and inside of others."""

import copy
import io
from typing import List  # noqa: UP035 - TorchScript knows it

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.errors import ConfigError
from graphcache.observe.breaks import find_capture_breaks
from tests.helpers import frozen, outcomes, same

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(5))


class Pure(nn.Module):
    count: int
    history: List[Tensor]  # noqa: UP006

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.history = []
        self.scale = 2.0
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.ones(4))
        self.plain = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.seen


class Counts(Pure):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.count


class Appends(Pure):
    def forward(self, x: Tensor) -> Tensor:
        self.history.append(x)
        return self.linear(x) + len(self.history)


class Rebinds(Pure):
    def forward(self, x: Tensor) -> Tensor:
        self.plain = self.plain * 1.5
        return self.linear(x) + self.plain


class Writes(Pure):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.linear(x) + self.seen


class Branches(Pure):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if bool(x.sum() > 0) else self.linear(x) * 2


class Draws(Pure):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand(4)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.after(self.inner(x))
        return made


def loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


WAYS = {
    "scripted": torch.jit.script,
    "traced": lambda module: torch.jit.trace(module, X),
    "frozen": lambda module: torch.jit.freeze(torch.jit.script(module)),
    "loaded": loaded,
    "inside another": lambda module: frozen(Around(torch.jit.script(module))),
}
EFFECTS = {
    Counts: Reason.MUTATES,
    Appends: Reason.MUTATES,
    Rebinds: Reason.MUTATES,
    Branches: Reason.HOST_READ,
    Draws: Reason.RANDOM,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_a_pure_module_is_one_graph(way, mode):
    module = WAYS[way](frozen(Pure()))
    with mode(), graphcache.wrap(module) as fast:
        for step in range(5):
            assert same(fast(X + step), module(X + step))
        assert outcomes(fast) == (4, 1, {})


@pytest.mark.parametrize("way", [way for way in WAYS if way != "traced"])
@pytest.mark.parametrize("kind", EFFECTS)
def test_effects_happen_once_a_call_and_are_the_reason(kind, way):
    module = WAYS[way](frozen(kind()))
    twin = copy.deepcopy(module)
    with torch.no_grad(), graphcache.wrap(module) as fast:
        for step in range(5):
            x = X * (-1) ** step
            torch.manual_seed(step)
            wanted = twin(x)
            torch.manual_seed(step)
            assert same(fast(x), wanted)
        assert fast.cache_info().eager[EFFECTS[kind]] > 0
        assert set(fast.cache_info().eager) == {EFFECTS[kind]}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "traced"])
def test_state_is_updated_once_a_call_by_a_graph(way):
    module = WAYS[way](frozen(Writes()))
    twin = copy.deepcopy(module)
    with torch.no_grad(), graphcache.wrap(module) as fast:
        for step in range(5):
            assert same(fast(X + step), twin(X + step))
        assert outcomes(fast) == (4, 1, {})


@pytest.mark.parametrize("way", ["scripted", "traced", "loaded", "inside another"])
def test_what_changes_between_calls_is_noticed(way):
    module = WAYS[way](frozen(Pure()))
    inner = module.inner if way == "inside another" else module

    def replace_weight() -> None:
        inner.linear.weight = nn.Parameter(torch.full((4, 4), 0.5), requires_grad=False)

    changes = [
        lambda: inner.linear.weight.mul_(2),
        replace_weight,
        lambda: setattr(inner, "seen", torch.full((4,), 9.0)),
        lambda: setattr(inner, "scale", 3.5),
        lambda: module.train(),
        lambda: module.double(),
    ]
    if way == "traced":
        # A trace holds numbers in its code.
        del changes[3]
    with torch.no_grad(), graphcache.wrap(module) as fast:
        x = X
        for change in changes:
            change()
            x = x.to(next(module.parameters()).dtype)
            for _ in range(3):
                assert same(fast(x), module(x))
        assert set(fast.cache_info().eager) == set()


def test_submodules_that_torchscript_runs_by_itself_are_no_parts():
    module = torch.jit.script(frozen(Branches()))
    with torch.no_grad(), graphcache.wrap(module) as fast:
        assert same(fast(X), module(X))
        assert fast.parts == {}
    for options in ({"include": ["linear"]}, {"exclude": ["linear"]}):
        with pytest.raises(ConfigError, match="there are no submodules that Python calls"):
            graphcache.wrap(module, **options)


def test_a_scripted_submodule_is_a_part_as_a_whole():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.script(frozen(Pure()))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.inner(x) * x.sum().item()
            return made

    module = Reads()
    with torch.no_grad(), graphcache.wrap(module) as fast:
        for step in range(4):
            assert same(fast(X + step), module(X + step))
        assert fast.parts["inner"].cache_info().hits > 0
    assert same(module(X), copy.deepcopy(module)(X))


@pytest.mark.parametrize("way", WAYS)
def test_the_doctor_finds_in_them_what_a_capture_finds(way):
    assert find_capture_breaks(WAYS[way](frozen(Pure())), X) == []
    if way != "traced":
        for kind, reason in EFFECTS.items():
            module = WAYS[way](frozen(kind()))
            assert reason in {each.reason for each in find_capture_breaks(module, X)}


def test_a_frozen_module_behaves_like_one_in_evaluation():
    module = torch.jit.freeze(torch.jit.script(frozen(Pure())))
    fast = graphcache.wrap(module)
    assert fast.training is False
    assert list(fast.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        assert same(copy.deepcopy(fast)(X), module(X))
