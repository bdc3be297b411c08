"""A wrapped module shows the attributes and methods of the module, whatever they are called."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, GraphConfig, controls
from graphcache.errors import ConfigError
from graphcache.modules.forward_patch import ForwardPatch, StatePatch
from graphcache.observe.counters import Counters
from tests.helpers import Fn, frozen, mlp, outcomes

X = torch.linspace(-1, 1, 8).reshape(2, 4)
PUBLIC = sorted(name for name in dir(CachedModule) if not name.startswith("_") and not hasattr(nn.Module, name))
SHARED = ["forward_into", "training"]


class Decoder(nn.Module):
    """Has names of its own, some of which graphcache has too, and methods that call ``forward``."""

    config = {"width": 4}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = 1.0
        self.session = "a session"
        self._half = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale

    def generate(self, x: Tensor, *, steps: int = 4) -> Tensor:
        """Call the module again and again."""
        for _ in range(steps):
            x = self(x)
        return x

    def decode(self, x: Tensor) -> Tensor:
        return self.forward(x) + 1

    def save(self, where: str) -> str:
        return f"saved to {where}"

    def itself(self) -> Decoder:
        return self

    def eval(self) -> Decoder:
        self.asked = True
        return super().eval()

    @property
    def half_scale(self) -> float:
        return self.scale / self._half

    @half_scale.setter
    def half_scale(self, value: float) -> None:
        self.scale = value * self._half


@pytest.fixture
def module() -> Decoder:
    return Decoder().requires_grad_(False)


@pytest.fixture
def fast(module: Decoder) -> CachedModule:
    return graphcache.wrap(module)


def test_what_is_set_reaches_the_module(module: Decoder, fast: CachedModule) -> None:
    for name, value in {"scale": 3.0, "half_scale": 4.0, "new": [1], "_private": 5, "training": False}.items():
        setattr(fast, name, value)
        assert getattr(module, name) == getattr(fast, name) == value
    fast.clear()
    assert torch.equal(fast(X), module.layer(X) * 8)
    del fast.new
    assert not hasattr(module, "new")
    with pytest.raises(AttributeError, match="new"):
        del fast.new


def test_layers_parameters_and_buffers_are_set_in_the_module(module: Decoder, fast: CachedModule) -> None:
    fast(X)
    fast.layer = frozen(nn.Linear(4, 4))
    assert fast.layer is module.layer
    assert torch.equal(fast(X), module(X))
    fast.register_buffer("table", torch.ones(2), persistent=False)
    assert "table" not in module.state_dict()
    assert fast.table is module.table
    fast.weight = nn.Parameter(torch.ones(1))
    assert dict(module.named_parameters())["weight"] is fast.weight
    del fast.weight
    assert "weight" not in dict(module.named_parameters())


def test_replaced_tables_of_the_module_are_followed(module: Decoder, fast: CachedModule) -> None:
    module.__setstate__(copy.deepcopy(module).__dict__)
    assert next(fast.parameters()) is module.layer.weight
    assert fast.layer is module.layer


def test_the_modules_own_names_win_and_graphcaches_are_under_controls(module: Decoder, fast: CachedModule) -> None:
    assert (fast.config, fast.session, fast.save("here")) == ({"width": 4}, "a session", "saved to here")
    assert controls(fast).config == GraphConfig()
    with controls(fast).session(X) as session:
        session.run()
    fast.config = {"width": 8}
    assert module.config == fast.config == {"width": 8}
    module.explain = "set after it was wrapped"
    assert fast.explain == "set after it was wrapped"
    del module.explain
    assert controls(fast).explain(X) == fast.explain(X)


@pytest.mark.parametrize("name", [each for each in PUBLIC if each not in SHARED])
def test_no_public_name_hides_one_of_the_module(name: str) -> None:
    module = mlp()
    setattr(module, name, 7)
    fast = graphcache.wrap(module)
    assert getattr(fast, name) == 7
    assert getattr(controls(fast), name) != 7
    # Nothing that graphcache does goes through the name.
    for _ in range(2):
        assert torch.equal(fast(X), module(X))
    assert controls(fast).prepare((X[:1],)).signatures == 1
    assert controls(fast).explain() is not None
    assert copy.deepcopy(fast)(X).shape == X.shape
    Counters(fast).read()
    controls(fast).clear()
    controls(fast).close()


OWN = ["_misses", "_cache", "_engine", "_table", "_config", "_module", "_replaced", "_calling", "_dispatcher"]


@pytest.mark.parametrize("name", OWN)
def test_no_private_name_hides_one_of_the_module(name: str) -> None:
    module = mlp()
    setattr(module, name, 7)
    fast = graphcache.wrap(module)
    assert getattr(fast, name) == 7
    setattr(fast, name, 8)
    assert getattr(module, name) == getattr(fast, name) == 8
    for _ in range(2):
        assert torch.equal(fast(X), module(X))
    assert controls(fast).cache_info().hits == 1
    assert getattr(copy.deepcopy(fast), name) == getattr(pickle.loads(pickle.dumps(fast)), name) == 8
    delattr(fast, name)
    assert not hasattr(module, name)
    assert not hasattr(fast, name)


def test_all_private_names_of_graphcache_have_its_prefix() -> None:
    fast = graphcache.wrap(mlp())
    fast.forward = fast.forward
    theirs = {*dir(nn.Module), *vars(nn.Module())}
    names = {*vars(fast), *(name for kind in type(fast).__mro__ if kind is not nn.Module for name in vars(kind))}
    ours = [name for name in names - theirs if name.startswith("_") and not name.startswith("__")]
    assert ours
    assert [name for name in ours if not name.startswith("_graphcache")] == []


@pytest.mark.parametrize("name", ["cache_info", "clear", "close", "parts", "config", "module", "ledger"])
def test_no_name_of_a_part_is_in_the_way(name: str) -> None:
    part = frozen(nn.Linear(4, 4))
    setattr(part, name, 7)
    module = nn.Sequential(part, Fn(lambda _, x: x[x > 0]))
    fast = graphcache.wrap(module)
    for _ in range(3):
        assert torch.equal(fast(X), module(X))
    assert fast.cache_info().hits == 1
    fast.clear()
    fast.close()


def test_names_that_the_module_makes_up_when_asked_win(fast: CachedModule) -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    around = graphcache.wrap(Around(Decoder().requires_grad_(False)))
    assert around.config == {"width": 4}
    assert around.cache_info().hits == 0


def test_controls_take_a_wrapped_module_alone_and_list_what_they_have(fast: CachedModule) -> None:
    with pytest.raises(ConfigError, match="expected a wrapped module, got Linear"):
        controls(nn.Linear(1, 1))
    assert {"cache_info", "config", "save"} <= set(dir(controls(fast)))
    with pytest.raises(AttributeError, match="nothing that is called 'generate'"):
        controls(fast).generate  # noqa: B018
    assert {"generate", "scale", "cache_info"} <= set(dir(fast))


def test_methods_that_call_forward_use_the_graphs(module: Decoder, fast: CachedModule) -> None:
    assert torch.equal(fast.generate(X), module.generate(X))
    assert outcomes(fast) == (3, 1, {})
    assert torch.equal(fast.decode(X), module.decode(X))
    assert outcomes(fast) == (4, 1, {})
    # At rest, and for whoever has the module itself, nothing has changed.
    assert not vars(module).keys() & {"forward", "__getstate__"}
    module.generate(X)
    assert outcomes(fast) == (4, 1, {})


def test_methods_that_call_forward_use_the_graphs_of_parts() -> None:
    class Cut(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum() + self.layer(x)

    module = Cut().requires_grad_(False)
    fast = graphcache.wrap(module)
    assert torch.equal(fast.generate(X), module.generate(X))
    assert fast.cache_info().hits == 2


def test_a_method_is_a_method(module: Decoder, fast: CachedModule) -> None:
    assert inspect.signature(fast.generate) == inspect.signature(module.generate)
    assert (fast.generate.__name__, fast.generate.__doc__) == ("generate", "Call the module again and again.")
    assert inspect.ismethod(fast.generate)
    assert fast.generate == fast.generate != graphcache.wrap(module).generate
    assert hash(fast.generate) == hash(fast.generate)
    assert torch.equal(pickle.loads(pickle.dumps(fast.generate))(X), module.generate(X))
    assert fast.itself() is fast
    assert fast.eval() is fast
    assert module.asked


def test_hooks_of_the_module_run_once(module: Decoder, fast: CachedModule) -> None:
    module.register_forward_hook(lambda _, args, answer: answer + 1)
    for _ in range(3):
        assert torch.equal(fast.generate(X), module.generate(X))


def test_a_closed_module_leaves_methods_usable(module: Decoder, fast: CachedModule) -> None:
    controls(fast).close()
    assert torch.equal(fast.generate(X), module.generate(X))


def test_a_method_disturbs_no_other_thread() -> None:
    seen: list[Tensor] = []

    class Beside(Decoder):
        def generate(self, x: Tensor, *, steps: int = 1) -> Tensor:
            other = threading.Thread(target=lambda: seen.append(self(x)))
            other.start()
            other.join()
            return self(x)

    module = Beside().requires_grad_(False)
    fast = graphcache.wrap(module)
    for _ in range(3):
        assert torch.equal(fast.generate(X), module(X))
    # Those of the other thread are the bare module's.
    assert outcomes(fast) == (2, 1, {})
    assert all(torch.equal(each, module(X)) for each in seen)


def test_forward_that_is_set_is_that_of_the_wrapped_module(module: Decoder, fast: CachedModule) -> None:
    original = fast.forward
    fast.forward = lambda x: original(x) + 1
    for _ in range(2):
        assert torch.equal(fast(X), module(X) + 1)
        assert torch.equal(fast.forward_into(torch.empty(2, 4), X), module(X) + 1)
    assert fast.cache_info().hits == 3
    del fast.forward
    assert torch.equal(fast(X), module(X))


def test_a_container_is_a_container() -> None:
    module = mlp()
    fast = graphcache.wrap(module)
    assert (len(fast), fast[0], list(fast)) == (len(module), module[0], list(module))
    fast[1] = nn.Tanh()
    assert torch.equal(fast(X), module(X))
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert isinstance(again, CachedModule)
        assert len(again) == len(module)
    assert not hasattr(graphcache.wrap(nn.ReLU()), "__len__")


def test_the_state_of_a_wrapped_module_within_another_is_loaded_as_the_module_loads_it() -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            self.loaded = True
            super()._load_from_state_dict(*args, **kwargs)

    inner = Own(2, 2)
    outer = nn.Sequential(graphcache.wrap(inner))
    outer.load_state_dict({"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(2)})
    assert inner.loaded
    assert inner.weight.sum() == 4


class Slotted(nn.Linear):
    """Has a place that is not in its ``__dict__``, and a state of its own making."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": True}


def copies(module: nn.Module) -> list[nn.Module]:
    return [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]


@pytest.mark.parametrize("kind", [nn.Linear, Slotted])
def test_a_part_is_copied_as_it_is_while_it_is_called(kind: type[nn.Module]) -> None:
    made: list[nn.Module] = []
    part = frozen(kind(4, 4))

    def cut(_: nn.Module, x: Tensor) -> Tensor:
        made.extend(copies(part))
        return x[x > 0]

    fast = graphcache.wrap(nn.Sequential(part, Fn(cut)))
    for _ in range(3):
        fast(X)
    wanted = part(X)
    for each in made:
        assert vars(each).keys() - {"made"} == vars(part).keys()
        assert torch.equal(each(X), wanted)
        assert each.forward.__self__ is each


def test_a_part_whose_forward_the_user_set_is_copied_with_it() -> None:
    made: list[nn.Module] = []
    part = frozen(nn.Linear(4, 4))
    part.forward = torch.relu

    def cut(_: nn.Module, x: Tensor) -> Tensor:
        made.extend(copies(part))
        return x[x > 0]

    fast = graphcache.wrap(nn.Sequential(part, Fn(cut)))
    for _ in range(2):
        fast(X)
    assert all(vars(each)["forward"] is torch.relu for each in made)
    assert part.forward is torch.relu


def test_a_route_that_a_copy_meets_is_the_copys_own_forward() -> None:
    # Of a thread that had looked for __getstate__ when another one laid the route.
    part = frozen(nn.Linear(4, 4))
    route = ForwardPatch(part)
    state = {**vars(part), "forward": route, "__getstate__": StatePatch(part)}
    again = copy.deepcopy(part, {})
    memo = {id(part): again}
    assert copy.deepcopy(route, memo) == again.forward
    assert copy.deepcopy(state["__getstate__"], memo) == again.__getstate__
    loaded, forward = pickle.loads(pickle.dumps((part, route)))
    assert forward == loaded.forward
    part.forward = torch.relu
    assert copy.deepcopy(ForwardPatch(part)) is torch.relu
    assert pickle.loads(pickle.dumps(ForwardPatch(part))) is torch.relu


def test_modules_are_put_together_as_the_wrapped_one_is() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fast: Any = graphcache.wrap(module)
    assert list(fast + nn.Sequential(nn.Tanh()))[:2] == list(module)
    assert len(fast * 2) == len(2 * fast) == 4
