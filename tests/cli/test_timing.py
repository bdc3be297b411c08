"""Percentiles, and what counts as the same answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cli.timing import difference, spread, timed


@given(st.lists(st.integers(0, 10**9), min_size=1))
def test_percentiles_are_in_order_and_among_the_times(times):
    found = spread(times)
    assert found["min"] <= found["p50"] <= found["p90"] <= found["p99"] <= found["max"]
    assert {found["p50"], found["p90"], found["p99"]} <= {round(time / 1000, 1) for time in times}
    assert found["calls"] == len(times)


def test_percentiles_of_a_hundred():
    found = spread(range(1000, 101_000, 1000))
    assert found == {"calls": 100, "min": 1.0, "mean": 50.5, "max": 100.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert spread([]) is None


def test_the_device_of_the_module_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    device = torch.device("cuda:1")
    timed(lambda: waited.append("call"), device)
    assert waited == [device, "call", device]


def test_timed_returns_the_answer_and_a_time():
    answer, nanoseconds = timed(lambda: 7, torch.device("cpu"))
    assert answer == 7
    assert nanoseconds > 0


@pytest.mark.parametrize(
    "value",
    [torch.tensor([1.0, float("nan"), float("inf")]), {"a": (torch.ones(2), [3, None])}, torch.empty(0), True],
)
def test_equal_answers(value):
    assert difference(value, value) is None


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        (torch.ones(2), torch.tensor([1.0, 1.0 + 1e-6]), "output 0: Tensor-likes are not equal"),
        (torch.ones(2), torch.ones(3), "shape"),
        (torch.ones(2), torch.ones(2).double(), "dtype"),
        ((torch.ones(2),), [torch.ones(2)], "its structure is"),
        ((torch.ones(2), 1), (torch.ones(2), 2), "value 1 is 1, expected 2"),
        (torch.ones(2), 1, "expected 1"),
    ],
)
def test_other_answers_are_told(got, expected, message):
    assert message in difference(got, expected)
