"""Sessions on the CPU: static inputs, one replay, static outputs."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.errors import CaptureError, ClosedError
from graphcache.graphs.buffers import packed
from graphcache.modules.session import Session
from tests.helpers import Fn, calls, in_threads, mlp, outcomes, tensors

FLOATS = (torch.float32, torch.float64)


def session_of(function: Any, *args: Any, **kwargs: Any) -> Session:
    return graphcache.wrap(Fn(lambda _, *a, **k: function(*a, **k))).session(*args, **kwargs)


@given(tensors(FLOATS), st.lists(st.floats(-9, 9, width=32), max_size=4))
def test_runs_on_what_was_written_into_its_inputs(x: Tensor, factors: list[float]) -> None:
    if x.numel() == 0:
        x = torch.ones(2, dtype=x.dtype)
    with session_of(lambda x: (x * 2, x.sum()), x) as session:
        (static,) = session.inputs
        assert torch.equal(static.expand_as(x), x), "they begin with the values of the call"
        places = [tensor.data_ptr() for tensor in session.outputs]
        for factor in factors:
            static.copy_(packed(x) * factor)
            session.run()
            assert torch.equal(session.outputs[0], static.expand_as(x) * 2)
            assert torch.equal(session.outputs[1], static.expand_as(x).sum())
        assert [tensor.data_ptr() for tensor in session.outputs] == places, "they stay where they are"


def test_one_tensor_given_several_times_is_one_static_input() -> None:
    x, y = torch.arange(9.0).reshape(3, 3), torch.ones(3, 3)
    with session_of(lambda a, b, c: a.t() * 2 + b if a is c else a - b, x, y, x) as session:
        first, second, third = session.inputs
        assert first is third
        first.fill_(4)
        second.fill_(1)
        session.run()
        assert session.outputs.tolist() == [[9.0] * 3] * 3


def test_nothing_is_run_before_run() -> None:
    x = torch.ones(3)
    session = session_of(lambda x: x * 2, x)
    session.run()
    session.inputs[0].fill_(5)
    assert session.outputs.tolist() == [2, 2, 2]
    x.fill_(7)
    session.run()
    assert session.outputs.tolist() == [10, 10, 10], "the caller's tensor is not read again"


def test_structures_and_keywords() -> None:
    session = session_of(
        lambda x, *, y: {"sum": x["a"] + y[0], "pair": (x["a"] * 2, 7)}, {"a": torch.ones(2)}, y=[torch.ones(2), 3]
    )
    first, second = session.inputs
    first.fill_(2)
    second.fill_(5)
    session.run()
    assert session.outputs["sum"].tolist() == [7, 7]
    assert session.outputs["pair"][0].tolist() == [4, 4]
    assert session.outputs["pair"][1] == 7


def test_an_output_that_is_an_input_is_the_static_input() -> None:
    session = session_of(lambda x: (x, x[1:], x + 1), torch.zeros(3))
    session.inputs[0].fill_(4)
    session.run()
    assert session.outputs[0] is session.inputs[0]
    assert session.outputs[1].data_ptr() == session.inputs[0][1:].data_ptr()
    assert session.outputs[2].tolist() == [5, 5, 5]


def test_is_no_part_of_the_cache() -> None:
    fast = graphcache.wrap(mlp())
    x = torch.randn(3, 4)
    session = fast.session(x)
    assert (outcomes(fast), calls(fast)) == ((0, 0, {}), 0)
    before = session.outputs.clone()
    fast(x)
    fast(x + 1)
    fast.close()
    session.inputs[0].copy_(x)
    session.run()
    assert torch.equal(session.outputs, fast.module(x))
    assert before.shape == session.outputs.shape


def test_sessions_of_one_signature_do_not_share_buffers() -> None:
    fast = graphcache.wrap(mlp())
    x = torch.randn(2, 4)
    one, two = fast.session(x), fast.session(x)
    one.run()
    two.inputs[0].zero_()
    two.run()
    assert torch.equal(one.outputs, fast.module(x))
    assert torch.equal(two.outputs, fast.module(torch.zeros(2, 4)))


def test_a_closed_session() -> None:
    session = session_of(lambda x: x * 2, torch.ones(2))
    run = session.run
    gone = [weakref.ref(session.inputs[0]), weakref.ref(session.outputs)]
    session.close()
    session.close()
    assert (session.inputs, session.outputs) == ((), None)
    for launch in (run, session.run):
        with pytest.raises(ClosedError, match=r"^the graph was closed; "):
            launch()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_leaving_the_block_closes_it_whatever_happened() -> None:
    with pytest.raises(ValueError, match="inside"), session_of(lambda x: x * 2, torch.ones(2)) as session:
        raise ValueError("inside")
    assert session.inputs == ()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x.sum().item(), Reason.HOST_READ),
        (lambda x: x.nonzero(), Reason.DATA_DEPENDENT),
        (lambda x: torch.rand_like(x), Reason.RANDOM),
        (lambda x: x.add_(1), Reason.MUTATES),
        (lambda x: object(), Reason.OUTPUT),
    ],
)
def test_what_cannot_be_captured_has_no_session(function: Any, reason: Reason) -> None:
    module = Fn(lambda _, x: function(x))
    with pytest.raises(CaptureError) as caught:
        graphcache.wrap(module).session(torch.ones(3))
    assert str(caught.value).startswith(f"Fn: {reason.value}: {reason.sentence}")
    assert str(caught.value).endswith(f"To change that: {reason.remedy}.")


def test_arguments_that_cannot_be_described() -> None:
    with pytest.raises(CaptureError, match=r"^Fn: argument: an argument can be neither copied into a graph nor told"):
        session_of(lambda x, y: x, torch.ones(2), object())


def test_gradients() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(CaptureError, match=r"^Linear: grad: the call may need gradients"):
        graphcache.wrap(module).session(torch.ones(1, 2))
    with torch.no_grad():
        session = graphcache.wrap(module).session(torch.ones(1, 2))
    session.run()
    assert not session.outputs.requires_grad
    assert torch.equal(session.outputs, module(torch.ones(1, 2)))


def test_where_graphs_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    with pytest.raises(CaptureError, match=r"^Fn: disabled: CUDA graphs are switched off here"):
        session_of(lambda x: x * 2, torch.ones(2))


def test_of_a_closed_module() -> None:
    fast = graphcache.wrap(mlp())
    fast.close()
    with pytest.raises(ClosedError, match=r"^Sequential was closed; wrap its \.module again$"):
        fast.session(torch.ones(1, 4))


def test_what_the_module_raises_comes_out() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        graphcache.wrap(mlp()).session(torch.ones(1, 5))


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        session = session_of(lambda x: x * 2, torch.ones(2))
        session.inputs[0].fill_(3)
        session.run()
    session.inputs[0].fill_(4)
    session.run()
    assert session.outputs.tolist() == [8, 8]


def test_weights_are_read_where_they_are() -> None:
    fast = graphcache.wrap(mlp())
    x = torch.randn(2, 4)
    session = fast.session(x)
    with torch.no_grad():
        fast.module[0].weight.mul_(2)
    session.run()
    assert torch.equal(session.outputs, fast.module(x))


def test_threads() -> None:
    session, lock = session_of(lambda x: x * 2 + 1, torch.ones(64)), threading.Lock()

    def work(index: int) -> None:
        for step in range(30):
            with lock:
                session.inputs[0].fill_(index * 100 + step)
                session.run()
                assert session.outputs.tolist() == [2 * (index * 100 + step) + 1] * 64

    in_threads(work)
