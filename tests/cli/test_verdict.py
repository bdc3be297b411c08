"""The line that says whether graphs help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cli.verdict import verdict

HOST, CALL = "the host takes", "µs to enqueue a call"


@pytest.mark.parametrize(
    ("eager", "enqueue", "graph", "said"),
    [
        (
            250.0,
            240.0,
            47.0,
            "launch-bound: the host takes 240 of 250 µs to enqueue a call; graphs help by about 5.3 times",
        ),
        (250.0, 240.0, None, f"launch-bound: {HOST} 240 of 250 {CALL}; graphs would help, but"),
        (
            900.0,
            100.0,
            890.0,
            "compute-bound: the host takes 100 of 900 µs to enqueue a call, the rest is the device's; ",
        ),
        (
            900.0,
            500.0,
            400.0,
            "launch-bound: the host takes 500 of 900 µs to enqueue a call; graphs help by about 2.2 times",
        ),
        (
            900.0,
            450.0,
            None,
            "no graph: the host takes 450 of 900 µs to enqueue a call, so that graphs would help by 2.0",
        ),
    ],
)
def test_what_is_said_on_cuda(eager, enqueue, graph, said):
    assert str(verdict(eager=eager, enqueue=enqueue, graph=graph, on_cuda=True)).startswith(said)


def test_a_call_that_a_graph_does_not_help_is_bound_by_computing():
    assert "do not help (1.01 times)" in verdict(eager=900.0, enqueue=90.0, graph=890.0, on_cuda=True).text
    assert verdict(eager=900.0, enqueue=90.0, graph=760.0, on_cuda=True).kind == "compute-bound"
    assert verdict(eager=900.0, enqueue=90.0, graph=740.0, on_cuda=True).kind == "launch-bound"


times = st.floats(0, 1e9)


@given(times, times, st.none() | times, st.booleans())
def test_any_times_have_a_verdict(eager, enqueue, graph, on_cuda):
    found = verdict(eager=eager, enqueue=min(enqueue, eager), graph=graph, on_cuda=on_cuda)
    assert found.kind in ("launch-bound", "compute-bound", "no launches", "no graph")
    assert (found.kind == "no launches") == (not on_cuda)
    assert "nan" not in found.text
