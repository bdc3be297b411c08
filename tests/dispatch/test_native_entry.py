"""Calls that come to the compiled library before they come to Python: which do, and what everybody else sees."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import weakref
from types import BuiltinFunctionType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import graphcache
from graphcache import CachedModule
from graphcache.dispatch import fast_path
from graphcache.errors import ClosedError, CudaError
from graphcache.graphs.cuda import CudaGraph
from graphcache.modules.cached_module import CachedModule as Class
from tests.dispatch import test_fast_path
from tests.dispatch.test_fast_path import Warm
from tests.engine_modules import rows
from tests.graphs.fake_driver import Torch
from tests.helpers import Fn, in_threads

# The stand-ins of the compiled short way, which this is the way into.
fake, warm = test_fast_path.fake, test_fast_path.warm


def entered(call: Any) -> set[str]:
    """The functions of the wrapped module that Python enters."""
    seen: set[str] = set()

    def notice(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == inspect.getfile(Class):
            seen.add(frame.f_code.co_name)

    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_a_hit_enters_no_method_of_the_module(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2, 3), rows(fake, 2)
    hits = warm.fast.cache_info().hits
    with torch.no_grad(), fake.on(warm.stream):
        answers: list[Tensor] = []
        assert entered(lambda: answers.append(warm.fast(x))) == set()
        # Python 3.11 enters a function that Python calls without asking for its vectorcall.
        into = entered(lambda: list(map(warm.fast.forward_into, [out], [x])))
        assert into == set()
    assert torch.equal(answers[0], x * 3 + 1)
    assert torch.equal(out, x * 3 + 1)
    assert warm.fast.cache_info().hits == hits + 2


def test_hooks_are_run(fake: Torch, warm: Warm) -> None:
    x, out, seen = rows(fake, 2), rows(fake, 2), []
    note = lambda *_: seen.append("one")  # noqa: E731
    with torch.no_grad(), fake.on(warm.stream):
        for add in (warm.fast.register_forward_hook, warm.fast.register_forward_pre_hook, register_module_forward_hook):
            hook = add(note)
            try:
                assert torch.equal(warm.fast(x), x * 3 + 1)
                assert torch.equal(warm.fast.forward_into(out, x), x * 3 + 1)
            finally:
                hook.remove()
            assert entered(lambda: warm.fast(x)) == set()
    assert len(seen) >= 6


def test_observers_hear_of_replays(fake: Torch, warm: Warm) -> None:
    class Observer:
        heard: ClassVar[list[str]] = []

        def before(self, kind: str, module: str) -> None:
            self.heard.append(kind)

        def after(self, kind: str, module: str, seconds: float, done: bool) -> None:
            self.heard.append(f"{kind} {done}")

    x = rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        end = warm.fast.observe(Observer())
        assert torch.equal(warm.fast(x), x * 3 + 1)
        end()
        assert Observer.heard == ["replay", "replay True"]
        assert entered(lambda: warm.fast(x)) == set()


def test_names_and_what_is_missing_find_the_functions_as_they_were_written(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2), rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        assert torch.equal(warm.fast(x=x), x * 3 + 1)
        assert torch.equal(warm.fast.forward_into(out, x=x), x * 3 + 1)
        assert torch.equal(warm.fast.forward_into(x=x, out=out), x * 3 + 1)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'out'"):
            warm.fast.forward_into()
        with pytest.raises(graphcache.errors.InputError):
            warm.fast()
        with pytest.raises(graphcache.errors.InputError):
            warm.fast.forward_into(out)
        with pytest.raises(TypeError):
            Class.__call__()  # type: ignore[call-arg]
        with pytest.raises(AttributeError):
            Class.__call__(object(), x)
        with pytest.raises(AttributeError):
            Class.forward_into(None, out, x)


def test_what_is_left_alone_is_answered_by_python(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2), rows(fake, 2)
    with torch.enable_grad(), fake.on(warm.stream):
        assert torch.equal(warm.fast(x), x * 3 + 1)
        assert torch.equal(warm.fast.forward_into(out, x), x * 3 + 1)
    with torch.no_grad(), fake.on(warm.stream):
        odd = x.to(torch.float64)
        with pytest.raises(graphcache.errors.InputDtypeError):
            warm.fast(odd)


def test_other_modules_are_answered_as_ever(fake: Torch, warm: Warm) -> None:
    bare = graphcache.wrap(Fn(lambda _, x: x + 1))
    x = torch.ones(3)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(bare(x), x + 1)
    assert bare.cache_info().hits == 2
    assert bare._graphcache_table is None


def test_a_subclass_with_a_call_of_its_own(fake: Torch, warm: Warm) -> None:
    class Twice(CachedModule):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    twice = Twice(warm.module)
    x = rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        for _ in range(4):
            assert torch.equal(twice(x), (x * 3 + 1) * 2)
    assert twice._graphcache_table is not None


def test_what_reads_the_code_finds_it(fake: Torch, warm: Warm) -> None:
    assert list(inspect.signature(Class.forward_into).parameters) == ["self", "out", "args", "kwargs"]
    assert "super().__call__" in inspect.getsource(Class.__call__)
    assert Class.__call__.__code__.co_name == "__call__"


def test_nothing_is_answered_here_while_something_is_compiled(
    fake: Torch, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        assert entered(lambda: warm.fast(x)) == set()
        monkeypatch.setattr(Class, "forward", lambda *_: "traced")
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        assert warm.fast(x) == "traced"


def test_a_compiled_program_traces_the_methods(fake: Torch, warm: Warm) -> None:
    fast = graphcache.wrap(nn.Linear(4, 4).requires_grad_(False))
    x = torch.ones(2, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def program(x: Tensor) -> Tensor:
        y: Tensor = fast(x)
        return y + 1

    with torch.no_grad():
        assert torch.equal(program(x), fast.module(x) + 1)


def test_a_copy_of_a_module_answers_too(fake: Torch, warm: Warm) -> None:
    x, other = rows(fake, 2), copy.copy(warm.fast)
    with torch.no_grad(), fake.on(warm.stream):
        assert torch.equal(other(x), x * 3 + 1)


def test_opening_takes_functions_and_dictionaries(compiled: Any) -> None:
    with pytest.raises(TypeError):
        compiled.open(len, len, {}, {}, {})
    with pytest.raises(TypeError):
        compiled.open(Class.__call__)


# ---- sessions


def session_of(warm: Warm, x: Tensor) -> Any:
    with torch.no_grad(), warm.fake.on(warm.stream):
        session = warm.fast.session(x)
        # The first launch on a stream is Python's, which orders it after what ran before.
        session.run()
    assert isinstance(session.run, BuiltinFunctionType)
    return session


def test_a_session_launches_and_does_nothing_else(fake: Torch, warm: Warm) -> None:
    x = rows(fake, 2)
    session = session_of(warm, x)
    fake.driver.calls.clear()
    with fake.on(warm.stream):
        for start in range(3):
            session.inputs[0].copy_(rows(fake, 2, start))
            assert session.run() is None
            assert torch.equal(session.outputs, rows(fake, 2, start) * 3 + 1)
    assert fake.driver.calls == ["cuGraphLaunch"] * 3
    with pytest.raises(TypeError, match="takes no arguments"):
        session.run(1)
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        session.run(x=1)


def test_a_session_on_another_stream_waits_for_the_one_before(fake: Torch, warm: Warm) -> None:
    session = session_of(warm, rows(fake, 2))
    fake.driver.calls.clear()
    with fake.on(fake.new_stream()):
        session.run()
        session.run()
    assert fake.driver.calls.count("cuStreamWaitEvent") == 1
    with fake.on(type(warm.stream)(fake.driver, 0)):
        session.run()
    assert fake.driver.calls.count("cuGraphLaunch") == 3


def test_a_session_that_was_closed_says_so(fake: Torch, warm: Warm) -> None:
    session = session_of(warm, rows(fake, 2))
    run = session.run
    session.close()
    with fake.on(warm.stream), pytest.raises(ClosedError, match="make a new session"):
        run()


def test_a_session_whose_launch_fails_says_so(fake: Torch, warm: Warm) -> None:
    session = session_of(warm, rows(fake, 2))
    fake.driver.fail("cuGraphLaunch", "OUT_OF_MEMORY")
    with fake.on(warm.stream):
        with pytest.raises(CudaError, match="cuGraphLaunch"):
            session.run()
        session.run()


def test_a_session_among_threads(fake: Torch, warm: Warm) -> None:
    session = session_of(warm, rows(fake, 2))
    launches = fake.driver.calls.count("cuGraphLaunch")

    def work(_: int) -> None:
        with fake.on(warm.stream):
            for _ in range(50):
                session.run()

    in_threads(work)
    assert fake.driver.calls.count("cuGraphLaunch") == launches + 200


def test_a_session_that_is_dropped_leaves_nothing(fake: Torch, warm: Warm) -> None:
    session = session_of(warm, rows(fake, 2))
    graph: CudaGraph = session.recorded.graph
    gone = [weakref.ref(graph), weakref.ref(session)]
    session.itself = session.run
    session.close()
    del session, graph
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_other_graphs_are_launched_by_python(fake: Torch, warm: Warm) -> None:
    host = graphcache.wrap(Fn(lambda _, x: x + 1))
    with torch.no_grad():
        session = host.session(torch.ones(2))
    assert fast_path.launcher(session.recorded.graph) == session.recorded.graph.launch
