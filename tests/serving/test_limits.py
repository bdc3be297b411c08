import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ConfigError
from graphcache.serving.limits import Limits


@pytest.mark.parametrize("name", ["max_request_bytes", "max_concurrency", "max_queue"])
@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, float("nan")])
def test_counts(name, value):
    with pytest.raises(ConfigError, match=f"^{name}=.*: expected a whole number, [01] or more$"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", ["request_seconds", "body_seconds"])
@pytest.mark.parametrize("value", [0, -1, True, "1", None, float("nan"), float("inf"), 10**400])
def test_seconds(name, value):
    with pytest.raises(ConfigError, match=f"^{name}=.*: expected seconds, more than 0 and less than 1e9$"):
        Limits(**{name: value})


@given(st.integers(1, 2**70), st.integers(1, 2**70), st.integers(0, 2**70), st.floats(1e-9, 1e8), st.floats(1e-9, 1e8))
def test_what_is_right_is_kept(nbytes, concurrency, queue, request, body):
    limits = Limits(
        max_request_bytes=nbytes,
        max_concurrency=concurrency,
        max_queue=queue,
        request_seconds=request,
        body_seconds=body,
    )
    assert dataclasses.astuple(limits) == (nbytes, concurrency, queue, request, body)
    assert dataclasses.replace(limits) == limits
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.max_queue = 3
