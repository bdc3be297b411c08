"""For whoever wants to know why there is no graph, and for tests that hold a module to its graphs."""

from __future__ import annotations

from graphcache.modules.explain import explain as explain
from graphcache.observe.breaks import Break as Break
from graphcache.observe.breaks import find_capture_breaks as find_capture_breaks
from graphcache.observe.counters import Counters as Counters
from graphcache.observe.counters import assert_max_captures as assert_max_captures
from graphcache.observe.drawing import dump_dot as dump_dot

__all__ = ["Break", "Counters", "assert_max_captures", "counters", "dump_dot", "explain", "find_capture_breaks"]

counters = Counters
