"""Which values are the same, and what shows the state of an object."""

from __future__ import annotations

import csv
import datetime
import decimal
from typing import Any

import pytest

from graphcache.keys.value_nodes import hidden_state
from graphcache.keys.values import Unobservable, same


class Metres(float):
    """A number with an attribute."""


ALIKE = [
    (1.5, 3.0 / 2),
    (float("nan"), float("nan")),
    (complex(1, -0.0), complex(1, -0.0)),
    (decimal.Decimal("1.50"), decimal.Decimal("1.50")),
    (datetime.date(2020, 1, 2), datetime.date(2020, 1, 2)),
    (slice(1, None), slice(1, None)),
    (range(0, 3, 2), range(0, 3, 2)),
    ((1, ("a", 2.0)), (1, ("a", 2.0))),
]
OTHERS: list[tuple[Any, Any]] = [
    (0.0, -0.0),
    (1, True),
    (complex(1, 0.0), complex(1, -0.0)),
    (decimal.Decimal("1.5"), decimal.Decimal("1.50")),
    (datetime.datetime(2020, 1, 2), datetime.datetime(2020, 1, 2, fold=1)),
    (slice(1, None), slice(True, None)),
    (range(0, 3, 2), range(0, 4, 2)),
    ((1, (0.0,)), (1, (-0.0,))),
    (Metres(1), Metres(1)),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_equal_plain_values_are_the_same(one: Any, other: Any) -> None:
    assert same(one, other)


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_equal_values_that_a_call_may_tell_apart_are_not(one: Any, other: Any) -> None:
    assert not same(one, other)


def test_an_iterator_of_an_extension_module_cannot_be_read() -> None:
    with pytest.raises(Unobservable, match="position of a reader"):
        hidden_state(csv.reader(["1"]))
