"""The cures that concern a device, taken out one by one over the stand-ins: a test fails without each of them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from graphcache.dispatch import targets
from graphcache.graphs import cuda, driver, stream_order
from tests.test_mutations import TakeOut, around, fails_without, list_of_guards, nothing, replace

ORDER = "tests/graphs/test_stream_order.py::"
CUDA = "tests/graphs/test_cuda.py::"
CAPTURE = "tests/graphs/test_capture.py::"
ENGINE = "tests/modules/test_engine_module.py::"


def _enter_without_waiting(self: stream_order.StreamOrder, stream: int) -> None:
    self.stream = stream


CURES: dict[str, tuple[TakeOut, str]] = {
    "launches on several streams are ordered": (
        replace(stream_order.StreamOrder, "enter", _enter_without_waiting),
        CUDA + "test_any_inputs_on_any_streams",
    ),
    "a graph is destroyed after its last launch": (
        replace(stream_order.StreamOrder, "_due", lambda self, wait: len(self._releases)),
        CUDA + "test_close_waits_for_the_last_launch",
    ),
    "an evicted graph stays until its last launch has finished": (
        replace(stream_order.StreamOrder, "_due", lambda self, wait: len(self._releases)),
        ENGINE + "test_an_eviction_waits_for_no_replay_and_frees_nothing_early",
    ),
    "what was put off is made up for": (
        replace(stream_order.StreamOrder, "reap", nothing),
        ORDER + "test_what_was_put_off_is_made_up_for",
    ),
    "nothing is waited for inside a capture": (
        replace(driver, "is_capturing", lambda stream: False),
        ORDER + "test_nothing_is_asked_or_waited_for_inside_a_capture_of_the_callers",
    ),
    "a graph without nodes is none": (
        around(driver, "call", lambda original, name, *args: ([], 1) if args[1:] == (0,) else original(name, *args)),
        CUDA + "test_a_graph_without_nodes_is_refused_and_released",
    ),
    "no garbage is collected inside a capture": (
        replace(stream_order, "quiet_collector", nullcontext()),
        CAPTURE + "test_no_collection_inside",
    ),
    "a tensor that is not aligned is copied": (
        around(
            cuda.IoSlot, "__init__", lambda original, self, buffer, pointers, _: original(self, buffer, pointers, 1)
        ),
        CUDA + "test_an_unaligned_out_is_refused_by_kernels_and_taken_by_copies",
    ),
    "an engine's graphs of before a refit are stale": (
        replace(targets.EngineGuard, "is_stale", lambda self, grad: False),
        ENGINE + "test_a_graph_captured_beside_a_refit_is_of_before",
    ),
}


@pytest.mark.parametrize("name", CURES)
def test_without_a_cure_its_guard_fails(name, monkeypatch):
    fails_without(*CURES[name], monkeypatch)


test_without_a_cure_its_guard_fails.__doc__ = list_of_guards({name: guard for name, (_, guard) in CURES.items()})
