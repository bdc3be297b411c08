"""Stand-ins for modules of Torch-TensorRT: names, attributes and answers as in its sources, over the TensorRT stand-in.

Of 2.11: ``PythonTorchTensorRTModule`` and ``TorchTensorRTModule``. Of 2.14: ``TorchTensorRTModule`` over ``TRTEngine``.
What their runtimes compute is computed here by the network itself, at once.
"""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import NETWORKS, serialize

ENGINE, NAMES_BETWEEN = 3, "%"


def settings(**others: Any) -> Any:
    return SimpleNamespace(
        device=SimpleNamespace(gpu_id=0), hardware_compatible=False, enable_weight_streaming=False, **others
    )


def _computed(network: str, inputs: list[str], outputs: list[str], given: Any) -> list[Tensor]:
    plain = {name: torch.as_tensor(value).clone() for name, value in zip(inputs, given, strict=True)}
    made = NETWORKS[network].compute(plain)
    heap = fake_tensorrt.device.heap
    return [heap.tensor(made[name].tolist()) for name in outputs]


def _io(network: str) -> tuple[list[str], list[str]]:
    io = NETWORKS[network].io
    return [each.name for each in io if each.is_input], [each.name for each in io if not each.is_input]


class PythonTorchTensorRTModule(nn.Module):
    def __init__(self, network: str, **options: Any) -> None:
        super().__init__()
        self.network = network
        self.name = options.get("name", "python")
        self.serialized_engine = serialize(network)
        inputs, outputs = _io(network)
        self.input_names = options.get("inputs", inputs)
        self.output_names = options.get("outputs", outputs)
        self.target_device_id = 0
        self.settings = settings()
        self.weight_name_map = options.get("weight_name_map")
        self.requires_output_allocator = options.get("requires_output_allocator", False)
        self.use_output_allocator_outputs = self.use_pre_allocated_outputs = False
        self.shape_key: str | None = None
        self.calls = 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "engine"] = self.serialized_engine

    def forward(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        self.calls += 1
        self.shape_key = "".join(str(tuple(each.shape)) for each in inputs)
        made = _computed(self.network, self.input_names, self.output_names, inputs)
        return made[0] if len(made) == 1 else made


class TorchTensorRTModule(nn.Module):
    """Of 2.11. With ``loaded`` its engine is where ``set_extra_state`` leaves it: in the engine object alone."""

    def __init__(self, network: str, *, loaded: bool = False, **options: Any) -> None:
        super().__init__()
        self.network = network
        self.name = options.get("name", "cpp")
        self.input_binding_names, self.output_binding_names = _io(network)
        self.settings = settings()
        self.weight_name_map = None
        self.requires_output_allocator = False
        self.hardware_compatible = False
        data = serialize(network)
        names = [NAMES_BETWEEN.join(each) for each in (self.input_binding_names, self.output_binding_names)]
        info = ["7", f"{self.name}_engine", "0%9%0%0%GPU", data, *names, "0", "", "linux", "0", "0"]
        self.engine: Any = TorchBind(info)
        if not loaded:
            self.serialized_engine = data
        self.calls = 0

    def get_extra_state(self) -> Any:
        return self.name, self.engine.__getstate__(), self.input_binding_names, self.output_binding_names

    def set_extra_state(self, state: Any) -> None:
        self.name = state[0]

    def forward(self, *inputs: Any) -> Any:
        if self.engine is None:
            raise RuntimeError("Engine has not been setup yet.")
        self.calls += 1
        made = _computed(self.network, self.input_binding_names, self.output_binding_names, inputs)
        return made[0] if len(made) == 1 else tuple(made)


class TorchBind:
    """``torch.classes.tensorrt.Engine``: what it holds is told by its pickle state."""

    def __init__(self, info: list[Any]) -> None:
        self._info = info

    def __getstate__(self) -> Any:
        state = list(self._info)
        state[ENGINE] = base64.b64encode(state[ENGINE]).decode()
        return state

    def __deepcopy__(self, memo: Any) -> TorchBind:
        return TorchBind(list(self._info))


class TRTEngine:
    """The Python engine of 2.14."""

    def __init__(self, serialized_info: list[Any]) -> None:
        self.serialized_info = list(serialized_info)
        self.serialized_engine = self.serialized_info[ENGINE]
        self.in_binding_names = self.serialized_info[4].split(NAMES_BETWEEN)
        self.out_binding_names = self.serialized_info[5].split(NAMES_BETWEEN)

    def __getstate__(self) -> Any:
        state = list(self.serialized_info)
        state[ENGINE] = base64.b64encode(state[ENGINE]).decode()
        return (state, "TRTEngine")


def module_of_2_14(network: str, *, bound: str = "python", **options: Any) -> nn.Module:
    """A ``TorchTensorRTModule`` of 2.14, whose engine is Python's or bound to C++."""
    made = TorchTensorRTModule(network)
    inputs, outputs = _io(network)
    names = [NAMES_BETWEEN.join(each) for each in (inputs, outputs)]
    info = ["10", "engine", "0%9%0%0%GPU", serialize(network), *names, "0", "", "linux", "0", "0", "0", ""]
    made.engine = TRTEngine(info) if bound == "python" else TorchBind(info)
    if options.pop("loaded", False):
        made.serialized_engine = None
    del made.weight_name_map
    own = {"aliased_io": {}, "requires_native_multidevice": False, "target_device": torch.device("cuda", 0)}
    made.__dict__.update({**own, **options})
    return made


def compiled(first: nn.Module, second: nn.Module, between: Any = None) -> fx.GraphModule:
    """What ``torch_tensorrt.dynamo.compile`` makes of a network with one graph break: engine, torch, engine."""
    root = nn.Module()
    root.add_module("_run_on_acc_0", first)
    root.add_module("_run_on_gpu_1", between or nn.ReLU())
    root.add_module("_run_on_acc_2", second)
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("_run_on_acc_0", "_run_on_gpu_1", "_run_on_acc_2"):
        x = graph.call_module(name, (x,))
    graph.output(x)
    return fx.GraphModule(root, graph)
