"""Time that is spent for graphs beside captures counts against what may be spent."""

from __future__ import annotations

from typing import Any

import pytest

from graphcache.cache.admission import Admission
from graphcache.cache.lru import GraphCache
from graphcache.errors import ConfigError


def calls_until_captured(charged: float) -> int:
    admission = Admission(GraphCache[Any](max_graphs=4))
    admission.learn("key", eager=200e-6, replay=20e-6, capture=5e-3)
    admission.charge(charged)
    calls = 0
    while admission.ask("key") is not None:
        admission.ran("key", 200e-6)
        calls += 1
    assert admission.account().capture_seconds == pytest.approx(charged)
    return calls


def test_what_was_charged_has_to_be_earned_first() -> None:
    free, small, large = calls_until_captured(0.0), calls_until_captured(1e-3), calls_until_captured(10e-3)
    assert free <= small < large
    # 4 % of the time of eager calls may be spent.
    assert large >= 10e-3 / (0.04 * 200e-6) - 20


@pytest.mark.parametrize("seconds", [-1, float("nan"), "1", None, True])
def test_what_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"^seconds="):
        Admission(GraphCache[Any](max_graphs=4)).charge(seconds)
