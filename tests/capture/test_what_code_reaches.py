"""State that code reaches in ways that no attribute of the module shows: answers and state are those of eager calls."""

from __future__ import annotations

import collections
import concurrent.futures
import contextvars
import ctypes
import dataclasses
import enum
import functools
import io
import itertools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphcache
from tests.helpers import Fn

X = torch.ones(1)
CALLS = 8


class Program(NamedTuple):
    """A module, and what its caller does before each call; ``state`` is compared after each call too."""

    module: nn.Module
    before: Callable[[int], Any] = lambda call: None
    args: Callable[[int], tuple[Any, ...]] = lambda call: (X,)
    state: Callable[[], Any] = lambda: None


class Holds(Fn):
    """Calls a function, and has attributes."""

    def __init__(self, function: Any, **attributes: Any) -> None:
        super().__init__(function)
        self.__dict__.update(attributes)


PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(function: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[function.__name__] = function
    return function


def module_of(source: str, name: str | None = "users_module") -> Any:
    """A module of Python with some source, as a user's package has."""
    made = types.ModuleType(name or "nobodys")
    if name is None:
        del made.__dict__["__name__"]
    else:
        sys.modules[name] = made
    exec(source, made.__dict__)
    return made


def steps(call: int) -> float:
    """What callers set something to: it changes at every second call."""
    return float(call // 2 + 1)


# ---- iterators and generators


@program
def a_generator_whose_loop_has_an_iterator() -> Program:
    def schedule() -> Any:
        yield from (rate for rate in [0.1] * 4 + [1.0] * 9)

    def flat() -> Any:
        for rate in [0.1] * 4 + [1.0] * 9:  # noqa: UP028 - the iterator is on the stack of this generator
            yield rate

    return Program(Holds(lambda self, x: x * next(self.flat) + next(self.nested), flat=flat(), nested=schedule()))


@program
def a_context() -> Program:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("scale")
    context = contextvars.copy_context()
    context.run(variable.set, 1.0)
    held = Holds(lambda self, x: x * self.context[variable], context=context)
    return Program(held, lambda call: context.run(variable.set, steps(call)))


@program
def an_exception() -> Program:
    error = ValueError(1.0)

    def change(call: int) -> None:
        error.args = (steps(call),)

    return Program(Holds(lambda self, x: x * self.error.args[0], error=error), change)


@program
def a_pointer_of_c() -> Program:
    number = ctypes.c_float(1.0)

    def change(call: int) -> None:
        number.value = steps(call)

    return Program(Holds(lambda self, x: x * self.pointer.contents.value, pointer=ctypes.pointer(number)), change)


@program
def an_attribute_of_a_weak_reference() -> Program:
    class Ref(weakref.ref):  # type: ignore[type-arg]
        gain = 1.0

    held = Holds(lambda self, x: x * self.ref.gain)
    held.__dict__["ref"] = ref = Ref(held)
    return Program(held, lambda call: setattr(ref, "gain", steps(call)))


# ---- functions that the walk does not come to by itself


@program
def a_default_factory() -> Program:
    ids = itertools.count()

    @dataclasses.dataclass
    class Request:
        x: Tensor
        number: int = dataclasses.field(default_factory=ids.__next__)

    return Program(Fn(lambda _, x: Request(x).x * 2), state=lambda: repr(ids))


@program
def a_default_of_init() -> Program:
    class Scale:
        def __init__(self, table: dict[str, float] = {"gain": 1.0}) -> None:  # noqa: B006 - what is tested
            self.gain = table["gain"]

    table = Scale.__init__.__defaults__[0]  # type: ignore[misc]
    return Program(Fn(lambda _, x: x * Scale().gain), lambda call: table.update(gain=steps(call)))


@program
def a_variable_that_init_counts_in() -> Program:
    made = 0

    class Node:
        def __init__(self) -> None:
            nonlocal made
            made += 1

    def forward(_: Any, x: Tensor) -> Tensor:
        Node()
        return x * 2

    return Program(Fn(forward), state=lambda: made)


@program
def a_class_six_calls_deep() -> Program:
    source = ["class Config: scale = 1.0"]
    source += [f"def f{depth}(x): return f{depth + 1}(x)" for depth in range(1, 6)]
    users = module_of("\n".join([*source, "def f6(x): return x * Config.scale"]))
    return Program(Fn(lambda _, x: users.f1(x)), lambda call: setattr(users.Config, "scale", steps(call)))


@program
def a_function_six_calls_deep_that_is_replaced() -> Program:
    source = [f"def f{depth}(x): return f{depth + 1}(x)" for depth in range(1, 6)]
    users = module_of("\n".join([*source, "def f6(x): return f7(x)", "def f7(x): return x * 1.0"]))
    return Program(Fn(lambda _, x: users.f1(x)), lambda call: setattr(users, "f7", partial(torch.mul, steps(call))))


@program
def a_function_that_a_traced_graph_calls() -> Program:
    users = module_of("class Config: scale = 1.0\ndef leaf(x): return x * Config.scale")
    graph = fx.Graph()
    graph.output(graph.call_function(users.leaf, (graph.placeholder("x"),)))
    return Program(fx.GraphModule(nn.Module(), graph), lambda call: setattr(users.Config, "scale", steps(call)))


@program
def a_function_of_no_module() -> Program:
    users = module_of("N = [0]\ndef f(x):\n  N[0] += 1\n  return x * (1.0 if N[0] < 5 else 2.0)", None)
    return Program(Holds(lambda self, x: self.f(x), f=users.f), state=lambda: users.N[0])


# ---- behind attributes of classes


@program
def a_cached_static_method() -> Program:
    drawn = itertools.count(1)

    class Model(nn.Module):
        @staticmethod
        @functools.lru_cache(None)
        def table(size: int) -> Tensor:
            return torch.full((size,), float(next(drawn)))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table(1)

    def change(call: int) -> None:
        if call == 4:
            Model.table.cache_clear()

    return Program(Model(), change, state=lambda: Model.table.cache_info().misses)


@program
def a_static_partial() -> Program:
    table = [1.0]

    class Model(nn.Module):
        act = staticmethod(functools.partial(lambda table, x: x * table[0], table))

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    return Program(Model(), lambda call: table.__setitem__(0, steps(call)))


@program
def the_setter_of_a_property() -> Program:
    def counted(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            wrapper.calls += 1  # type: ignore[attr-defined]
            return function(*args)

        wrapper.calls = 0  # type: ignore[attr-defined]
        return wrapper

    class Model(nn.Module):
        level = property(lambda self: 1, counted(lambda self, value: None))

        def forward(self, x: Tensor) -> Tensor:
            self.level = 1
            return x * 2

    return Program(Model(), state=lambda: Model.level.fset.calls)


@program
def a_class_attribute_with_a_special_name() -> Program:
    class Model(nn.Module):
        __table__ = {"gain": 1.0}  # noqa: RUF012 - what is tested

        def forward(self, x: Tensor) -> Tensor:
            return x * self.__table__["gain"]

    return Program(Model(), lambda call: Model.__table__.update(gain=steps(call)))


@program
def a_class_made_at_run_time() -> Program:
    made: Any = dataclasses.make_dataclass("Made", ["a"], namespace={"gain": lambda self: type(self).scale})
    made.scale = 1.0
    return Program(
        Holds(lambda self, x: x * self.made.gain(), made=made(1)), lambda call: setattr(made, "scale", steps(call))
    )


@program
def attributes_in_an_ordered_dictionary() -> Program:
    class Config:
        def __init__(self, **values: Any) -> None:
            self.__dict__ = collections.OrderedDict(values)

    def forward(self: Any, x: Tensor) -> Tensor:
        self.config.n += 1
        return x * (1.0 if self.config.n < 5 else 2.0)

    config = Config(n=0)
    return Program(Holds(forward, config=config), state=lambda: config.n)  # type: ignore[attr-defined]


# ---- classes of arguments


@program
def the_class_of_a_member_of_an_enumeration() -> Program:
    class Mode(enum.Enum):
        FAST = 1

        def gain(self) -> float:
            return type(self).scale  # type: ignore[attr-defined, no-any-return]

    def change(call: int) -> None:
        Mode.scale = steps(call)  # type: ignore[attr-defined]

    return Program(Fn(lambda _, x, mode: x * mode.gain()), change, lambda call: (X, Mode.FAST))


@program
def the_class_of_a_named_tuple() -> Program:
    class Pair(NamedTuple):
        x: Tensor

        def scaled(self) -> Tensor:
            return self.x * Pair.scale  # type: ignore[attr-defined]

    def change(call: int) -> None:
        Pair.scale = steps(call)  # type: ignore[attr-defined]

    return Program(Fn(lambda _, pair: pair.scaled()), change, lambda call: (Pair(X),))


class Batch:
    """A registered container, whose method is replaced."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def get(self) -> Tensor:
        return self.x * 1


pytree.register_pytree_node(Batch, lambda batch: ([batch.x], None), lambda items, _: Batch(*items))


@program
def a_method_of_a_registered_container() -> Program:
    def change(call: int) -> None:
        scale = steps(call)
        Batch.get = lambda self: self.x * scale  # type: ignore[method-assign]

    return Program(Fn(lambda _, batch: batch.get()), change, lambda call: (Batch(X),))


# ---- by names


@program
def globals_by_a_constant() -> Program:
    users = module_of("SCALE = 1.0\ndef f(x): return x * globals()['SCALE']")
    return Program(Fn(lambda _, x: users.f(x)), lambda call: setattr(users, "SCALE", steps(call)))


@program
def a_module_by_its_name() -> Program:
    users = module_of("scale = 1.0", "users_config")
    return Program(
        Fn(lambda _, x: x * sys.modules["users_config"].scale), lambda call: setattr(users, "scale", steps(call))
    )


@program
def a_name_that_somebody_put_into_builtins() -> Program:
    import builtins

    builtins.USERS_SCALE = 1.0  # type: ignore[attr-defined]
    users = module_of("def f(x): return x * USERS_SCALE")
    return Program(Fn(lambda _, x: users.f(x)), lambda call: setattr(builtins, "USERS_SCALE", steps(call)))


@program
def a_list_of_a_library() -> Program:
    before = list(sys.argv)

    def change(call: int) -> None:
        sys.argv[:] = [*before, *["--more"] * (call // 2 if call < CALLS - 1 else 0)]

    return Program(Fn(lambda _, x: x * len(sys.argv)), change)


# ---- what runs and logs


@program
def a_future_that_is_polled() -> Program:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def change(call: int) -> None:
        if call == 4:
            future.set_result(None)

    return Program(Holds(lambda self, x: x * (2 if self.future.done() else 1), future=future), change)


@program
def a_thread_that_is_polled() -> Program:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()

    def change(call: int) -> None:
        if call == 4:
            end.set()
            thread.join()

    return Program(Holds(lambda self, x: x * (2 if self.thread.is_alive() else 1), thread=thread), change)


@program
def an_attribute_of_a_thread() -> Program:
    class Loader(threading.Thread):
        def __init__(self) -> None:
            super().__init__()
            self._latest = [1.0]

    loader = Loader()
    held = Holds(lambda self, x: x * self.loader._latest[0], loader=loader)
    return Program(held, lambda call: loader._latest.__setitem__(0, steps(call)))


@program
def the_level_of_a_logger() -> Program:
    logger, seen = logging.getLogger(f"{__name__}.users"), list[Any]()
    logger.setLevel(logging.WARNING)
    logger.propagate = False

    class Handler(logging.Handler):
        def emit(self, record: Any) -> None:
            seen.append(record)

    logger.handlers = [Handler()]

    def change(call: int) -> None:
        if call == 4:
            logger.setLevel(logging.DEBUG)

    def forward(_: Any, x: Tensor) -> Tensor:
        logger.debug("here")
        return x * (3 if logger.isEnabledFor(logging.DEBUG) else 1)

    return Program(Fn(forward), change, state=lambda: len(seen))


# ---- gradients


@program
def an_optimizer_without_gradients_yet() -> Program:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def forward(self: Any, x: Tensor) -> Tensor:
        self.optimizer.step()
        return x * self.weight

    module = Holds(forward, optimizer=optimizer)
    module.weight = weight

    def change(call: int) -> None:
        if call == 3:
            weight.grad = torch.ones(1)

    return Program(module, change, state=weight.item)


@program
def the_gradient_of_a_plain_tensor() -> Program:
    weight = torch.ones(1)

    def change(call: int) -> None:
        if call == 3:
            weight.grad = torch.ones(1)

    return Program(Holds(lambda self, x: x * (1 if self.w.grad is None else 2), w=weight), change)


# ---- answers and arguments


@program
def an_answer_with_an_attribute() -> Program:
    class Label(str):
        score: Tensor

    def forward(_: Any, x: Tensor) -> Any:
        label = Label("cat")
        label.score = x.sum()
        return label

    return Program(Fn(forward), args=lambda call: (torch.full((1,), float(call)),))


@program
def a_memory_of_arguments_by_identity() -> Program:
    memo: dict[int, float] = {}

    def forward(_: Any, x: Tensor) -> Tensor:
        if id(x) not in memo:
            memo[id(x)] = float(len(memo) + 1)
        return x * memo[id(x)]

    first, second = torch.ones(1), torch.ones(1)
    return Program(Fn(forward), args=lambda call: (second if call in (3, 6) else first,), state=lambda: len(memo))


@program
def what_was_made_of_a_version_of_a_tensor() -> Program:
    table = torch.ones(1)

    def forward(self: Any, x: Tensor) -> Tensor:
        if table._version != self.seen:
            self.seen, self.made = table._version, table * 2
        return x * self.made

    return Program(Holds(forward, seen=-1, made=None), before=lambda call: call % 4 == 3 and table.add_(1))


@program
def a_default_of_every_thread() -> Program:
    class Local(threading.local):
        scale = 1.0

    local = Local()
    return Program(Fn(lambda _, x: x * local.scale), before=lambda call: setattr(Local, "scale", float(call // 3)))


@program
def a_package_with_the_name_of_a_standard_one() -> Program:
    module_of("__path__ = ['/home/somebody/this']", "this")
    module = module_of("def forward(self, x): return x * SCALE", "this.model")
    module.SCALE = 1.0
    return Program(Fn(module.forward), before=lambda call: setattr(module, "SCALE", float(call // 3)))


@program
def a_function_that_a_function_of_torch_uses() -> Program:
    attention = nn.MultiheadAttention(2, 1, batch_first=True).requires_grad_(False)
    functional, own = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention

    def other(*args: Any, **kwargs: Any) -> Tensor:
        return own(*args, **kwargs) * 0

    def before(call: int) -> None:
        functional.scaled_dot_product_attention = other if call in (4, 5) else own

    torch.nn.init.ones_(attention.in_proj_weight)
    torch.nn.init.ones_(attention.out_proj.weight)
    x = torch.ones(1, 1, 2)
    return Program(attention, before, lambda call: (x, x, x, None, False))


@program
def the_lines_of_a_file() -> Program:
    lines = io.TextIOWrapper(io.BytesIO(b"".join(b"%d\n" % number for number in range(20))))
    return Program(Holds(lambda self, x: x * float(next(self.lines)), lines=lines))


def series(made: Program, *, wrapped: bool, **options: Any) -> list[Any]:
    """Answers and state of some calls."""
    call_of = graphcache.wrap(made.module, **options) if wrapped else made.module
    found = []
    with torch.no_grad():
        for call in range(CALLS):
            made.before(call)
            answer = call_of(*made.args(call))
            answer = answer[0] if isinstance(answer, tuple) else answer
            found.append((getattr(answer, "score", answer).tolist(), made.state()))
    return found


@pytest.mark.parametrize("options", [{}, {"capture_in": "background"}], ids=["now", "background"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_answers_and_state_are_those_of_eager_calls(name: str, options: dict[str, Any]) -> None:
    wanted = series(PROGRAMS[name](), wrapped=False)
    assert series(PROGRAMS[name](), wrapped=True, **options) == wanted
