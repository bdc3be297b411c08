"""From the arguments of a call to a tree (:mod:`graphcache.cache.tree`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.cache.tree import DEEPEST, DEVICE, MOST_BITS, MOST_BYTES, OF_TENSORS, TAGS, contiguous, extent
from graphcache.errors import Reason, Refusal, shown

_MOST_NODES = 20_000


class Writer:
    """Writes the values of one call.

    Example:
        >>> Writer().write((1, float("nan")), "args[0]")
        {'tuple': [1, {'float': 'nan'}]}
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._nodes: list[dict[str, Any]] = []
        self._uses = 0
        self._left = _MOST_NODES
        self.nbytes = 0
        """Bytes of the memory from the first to the last element of each tensor."""

    def write(self, value: Any, where: str, depth: int = 0) -> Any:
        """The tree of a value.

        Raises:
            Refusal: With :attr:`Reason.ARGUMENT`, for what needs code to be made again (enumerations, named tuples,
                registered containers), and for what no signature describes.
        """
        kind = type(value)
        self._left -= 1
        if self._left < 0:
            raise Refusal(Reason.ARGUMENT, where.partition("[")[0], f"more than {_MOST_NODES} values")
        if depth > DEEPEST:
            raise Refusal(Reason.ARGUMENT, where.partition("[")[0], f"more than {DEEPEST} containers in one another")
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            if value.bit_length() > MOST_BITS:
                raise Refusal(Reason.ARGUMENT, where, f"a whole number of more than {MOST_BITS} bits")
            return value
        if kind is list:
            return self._each(value, where, depth)
        if kind is Tensor or kind is torch.nn.Parameter:
            return self._tensor(value, where)
        if kind is dict:
            return {"dict": [self._pair(name, item, where, depth) for name, item in value.items()]}
        if kind in TAGS:
            return {TAGS[kind]: str(value).removeprefix("torch.")}
        if kind is torch.device and DEVICE.fullmatch(str(value)):
            return {"device": str(value)}
        plain: dict[type, Callable[[], dict[str, Any]]] = {
            tuple: lambda: {"tuple": self._each(value, where, depth)},
            float: lambda: {"float": value.hex()},
            complex: lambda: {"complex": [value.real.hex(), value.imag.hex()]},
            bytes: lambda: {"bytes": value.hex()},
            torch.Size: lambda: {"size": list(value)},
            slice: lambda: {"slice": self._constants((value.start, value.stop, value.step), where, depth)},
            range: lambda: {"range": self._constants((value.start, value.stop, value.step), where, depth)},
        }
        if kind not in plain:
            raise Refusal(Reason.ARGUMENT, where, f"an object of type {kind.__module__}.{kind.__qualname__}")
        return plain[kind]()

    def place(self) -> None:
        """Say of each tensor where it lies, once all are written.

        Raises:
            Refusal: If they lie on several devices beside the CPU.
        """
        devices = {tensor.device for tensor in self._tensors if tensor.device.type != "cpu"}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise Refusal(Reason.ARGUMENT, detail=f"tensors on {names}, of which an example has one only")
        for tensor, node in zip(self._tensors, self._nodes, strict=True):
            if devices and tensor.device.type == "cpu":
                node["host"] = True

    def _each(self, values: Sequence[Any], where: str, depth: int) -> list[Any]:
        return [self.write(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(values)]

    def _pair(self, name: Any, item: Any, where: str, depth: int) -> list[Any]:
        key = self._constant(name, f"a key of {where}", depth)
        return [key, self.write(item, f"{where}[{shown(name)}]", depth + 1)]

    def _constants(self, values: Sequence[Any], where: str, depth: int) -> list[Any]:
        return [self._constant(item, where, depth) for item in values]

    def _constant(self, value: Any, where: str, depth: int) -> Any:
        """What stands where no tensor can."""
        before = self._uses
        node = self.write(value, where, depth + 1)
        if self._uses > before:
            raise Refusal(Reason.ARGUMENT, where, "a tensor where only a constant can stand")
        return node

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        self._uses += 1
        for index, tensor in enumerate(self._tensors):
            if tensor is value:
                return {"again": index}
        name = str(value.dtype).removeprefix("torch.")
        if value.is_nested or value.layout is not torch.strided or name not in OF_TENSORS:
            raise Refusal(Reason.ARGUMENT, where, f"a tensor of dtype {name}, layout {value.layout}")
        if value.is_conj() or value.is_neg():
            raise Refusal(Reason.ARGUMENT, where, "a tensor with a pending conjugation or negation")
        if torch.is_grad_enabled() and value.requires_grad:
            raise Refusal(Reason.GRAD, where, "an input requires gradients")
        node: dict[str, Any] = {"dtype": name, "shape": list(value.shape)}
        if value.stride() != contiguous(value.shape):
            node["stride"] = list(value.stride())
        nbytes = extent(value.shape, value.stride()) * value.dtype.itemsize
        if nbytes > MOST_BYTES:
            raise Refusal(Reason.ARGUMENT, where, f"a tensor over {nbytes} bytes")
        self.nbytes += nbytes
        self._tensors.append(value)
        self._nodes.append(node)
        return {"tensor": node}
