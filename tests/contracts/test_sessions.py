"""Static buffers: ``session`` gives the graph of one call with its inputs and outputs in the caller's hands."""

import pytest
import torch

import graphcache
from graphcache import Session
from graphcache.errors import CaptureError, ClosedError
from tests.helpers import Fn, mlp


def test_inputs_are_written_in_place_and_outputs_stay_where_they_are():
    module, x = mlp(), torch.randn(2, 4)
    with graphcache.wrap(module) as fast, fast.session(x) as session:
        assert isinstance(session, Session)
        assert torch.equal(session.inputs[0], x), "they begin with the values of the call"
        place = session.outputs.data_ptr()
        for factor in (1, 2, 3):
            session.inputs[0].copy_(x * factor)
            session.run()
            assert torch.equal(session.outputs, module(x * factor))
            assert session.outputs.data_ptr() == place


def test_of_an_engine_a_run_is_one_launch(fake, load, rows):
    with graphcache.wrap(load("affine")) as fast, fast.session(rows(2)) as session:
        session.inputs[0].copy_(rows(2, 5))
        fake.driver.calls.clear()
        session.run()
        assert fake.driver.calls.count("cuGraphLaunch") == 1
        assert torch.equal(session.outputs, rows(2, 5) * 3 + 1)


def test_it_is_no_part_of_the_cache():
    fast, x = graphcache.wrap(mlp(), max_graphs=1), torch.ones(1, 4)
    session = fast.session(x)
    assert (fast.cache_info().graphs, fast.cache_info().captures) == (0, 0)
    fast.close()
    session.run()
    assert torch.equal(session.outputs, fast.module(x))


def test_a_closed_session_refuses():
    session = graphcache.wrap(mlp()).session(torch.ones(1, 4))
    session.close()
    session.close()
    with pytest.raises(ClosedError):
        session.run()


def test_a_call_that_cannot_be_captured_has_none():
    fast = graphcache.wrap(Fn(lambda _, x: x * x.sum().item()))
    with pytest.raises(CaptureError, match="host_read"):
        fast.session(torch.ones(2))
