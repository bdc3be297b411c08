"""The systems that the suite measures side by side, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.systems.base import Peer as Peer
from bench.systems.by_hand import ByHand
from bench.systems.floor import Floor, TorchFloor
from bench.systems.graphcache_modes import Fresh, Into, Module, Session
from bench.systems.graphed_callables import GraphedCallables
from bench.systems.rtx_graphs import RtxGraphs
from bench.systems.tensorrt_eager import TensorRTEager
from bench.systems.torch_compile import Compiled
from bench.systems.torch_tensorrt_modules import TorchTensorRT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SYSTEMS: Mapping[str, Callable[[], Peer]] = {
    "raw": Floor,
    "graphcache": Fresh,
    "graphcache-into": Into,
    "graphcache-session": Session,
    "graphcache-isolated": lambda: Fresh("graphcache-isolated", isolation="full"),
    "graphcache-no-native": lambda: Fresh("graphcache-no-native", native=False),
    "tensorrt": TensorRTEager,
    "rtx-graphs": RtxGraphs,
    "rtx-graphs-copy": lambda: RtxGraphs(copied=True),
    "torch-tensorrt-cpp": lambda: TorchTensorRT("cpp"),
    "torch-tensorrt-python": lambda: TorchTensorRT("python"),
    "raw-torch": TorchFloor,
    "graphcache-torch": Module,
    "graphcache-torch-no-native": lambda: Module("graphcache-torch-no-native", native=False),
    "by-hand": ByHand,
    "graphed-callables": GraphedCallables,
    "graphcache-compiled": lambda: Module("graphcache-compiled", compiled=True),
    "compile-static": lambda: Compiled(dynamic=False),
    "compile-dynamic": lambda: Compiled(dynamic=True),
}
"""Each system by name, in the order of the table; each call makes a new object, for one measurement."""

FLOORS = {"engine": "raw", "torch": "raw-torch"}
"""What systems of a kind take turns with."""

PACKAGES = ("torch-tensorrt-rtx", "torch-tensorrt", "triton")
"""Distributions whose versions are recorded, beyond those of :func:`bench.record.environment`."""
