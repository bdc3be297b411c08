"""The cures that concern a device, taken out one by one over the stand-ins: a test fails without each of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from graphcache.cache import templates
from graphcache.graphs import capture, cuda, driver, lane, slots, template
from graphcache.modules import freshness, recall, shared_contexts
from tests.test_mutations import TakeOut, around, fails_without, list_of_guards, nothing, replace

LANE = "tests/graphs/test_lane.py::"
CUDA = "tests/graphs/test_cuda.py::"
CAPTURE = "tests/graphs/test_capture.py::"
ENGINE = "tests/modules/test_engine_module.py::"
TEMPLATE = "tests/graphs/test_template.py::"
RECALL = "tests/modules/test_recall.py::"


def _enter_without_waiting(self: lane.Lane, stream: int) -> None:
    self.stream, self.handle = stream, driver.binding().CUstream(stream)


def _as_of_now(original: Any, self: templates.Templates[Any], key: Any, item: Any, _: int) -> Any:
    return original(self, key, item, self.generation)


CURES: dict[str, tuple[TakeOut, str]] = {
    "launches on several streams are ordered": (
        replace(lane.Lane, "enter", _enter_without_waiting),
        CUDA + "test_any_inputs_on_any_streams",
    ),
    "a graph is destroyed after its last launch": (
        replace(lane.Lane, "_due", lambda self, wait: len(self._releases)),
        CUDA + "test_close_waits_for_the_last_launch",
    ),
    "an evicted graph stays until its last launch has finished": (
        replace(lane.Lane, "_due", lambda self, wait: len(self._releases)),
        ENGINE + "test_an_eviction_waits_for_no_replay_and_frees_nothing_early",
    ),
    "what was put off is made up for": (
        replace(lane.Lane, "reap", nothing),
        LANE + "test_what_was_put_off_is_made_up_for",
    ),
    "nothing is waited for inside a capture": (
        replace(driver, "is_capturing", lambda stream: False),
        LANE + "test_nothing_is_asked_or_waited_for_inside_a_capture_of_the_callers",
    ),
    "a graph without nodes is none": (
        replace(driver, "node_count", lambda graph: 1),
        CUDA + "test_a_graph_without_nodes_is_refused_and_released",
    ),
    "no garbage is collected inside a capture": (
        replace(capture, "_quiet_collector", nullcontext),
        CAPTURE + "test_no_collection_inside",
    ),
    "a tensor that is not aligned is copied": (
        around(slots.Slot, "__init__", lambda original, self, buffer, pointers, _: original(self, buffer, pointers, 1)),
        CUDA + "test_an_unaligned_out_is_refused_by_kernels_and_taken_by_copies",
    ),
    "an engine's graphs of before a refit are stale": (
        replace(freshness.Freshness, "is_stale", lambda self, grad: False),
        ENGINE + "test_a_graph_captured_beside_a_refit_is_of_before",
    ),
    "ready outputs are of one inference mode": (
        replace(cuda, "_is_inference_mode", lambda: False),
        CUDA + "test_ready_outputs_are_used_in_their_own_inference_mode_only",
    ),
    "what a template copies goes through buffers of the new graph": (
        replace(template.Template, "_move", nothing),
        TEMPLATE + "test_what_is_copied_goes_through_buffers_of_the_new_graph",
    ),
    "what another capture has broken is not had back": (
        replace(recall.Recallable, "_verify", nothing),
        RECALL + "test_one_that_another_capture_has_broken_is_found_out",
    ),
    "graphs that came back are looked at with what callers give": (
        replace(recall, "refill", nothing),
        RECALL + "test_one_that_came_back_is_looked_at_like_any_other",
    ),
    "graphs that came back are looked at with more than zeros": (
        replace(shared_contexts.Shared, "vary", nothing),
        RECALL + "test_one_that_came_back_for_zeros_is_looked_at_with_something_else",
    ),
    "nothing of before a change is had back": (
        around(templates.Templates, "clear", lambda original, self: setattr(self, "generation", self.generation + 1)),
        RECALL + "test_nothing_of_before_comes_back",
    ),
    "what an eviction keeps is of its own time": (
        around(templates.Templates, "put", _as_of_now),
        RECALL + "test_what_an_eviction_keeps_while_everything_is_forgotten_does_not_stay",
    ),
}


@pytest.mark.parametrize("name", CURES)
def test_without_a_cure_its_guard_fails(name, monkeypatch):
    fails_without(*CURES[name], monkeypatch)


test_without_a_cure_its_guard_fails.__doc__ = list_of_guards({name: guard for name, (_, guard) in CURES.items()})
