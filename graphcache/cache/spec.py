"""A call as text that outlives the process: its arguments without the values of tensors, and the modes it runs in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphcache.cache.tree import TreeError, contiguous, extent
from graphcache.cache.tree_reader import Make, Reader
from graphcache.cache.tree_writer import Writer
from graphcache.errors import Reason, Refusal, shown

MOST_TEXT = 64 * 1024
"""Characters of one call."""
_AUTOCAST = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Spec:
    """A call. Calls of equal specs have equal signatures.

    Args:
        text: JSON, the same for the same call.
        nbytes: Bytes of the tensors that :func:`example_of` makes.
    """

    text: str
    nbytes: int = field(compare=False)

    @classmethod
    def of_tree(cls, tree: Any) -> Spec:
        """A spec from what its JSON holds.

        Raises:
            TreeError: If that is no call.
        """
        nbytes = 0

        def measure(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], host: bool) -> None:
            nonlocal nbytes
            nbytes += extent(shape, stride) * dtype.itemsize

        _arguments(tree, measure)
        _Modes.of_tree(tree["modes"])
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        if len(text) > MOST_TEXT:
            raise TreeError("call", f"{len(text)} characters", f"at most {MOST_TEXT}")
        return cls(text, nbytes)

    @property
    def tree(self) -> Any:
        """What the JSON holds."""
        return json.loads(self.text)

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Inside, the grad mode, inference mode and autocast are those of the call.

        Autocast for CUDA is left out where there is no CUDA device.
        """
        wanted = _Modes.of_tree(self.tree["modes"])
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(wanted.inference))
            stack.enter_context(torch.set_grad_enabled(wanted.grad))
            for kind in ("cuda", "cpu"):
                name = wanted.autocast.get(kind)
                if name is not None and (kind == "cpu" or torch.cuda.is_available()):
                    stack.enter_context(torch.autocast(kind, _AUTOCAST[name]))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def spec_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spec:
    """The spec of a call, under the modes of this moment.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        Refusal: With :attr:`Reason.ARGUMENT` for an argument that cannot be told in text, or with :attr:`Reason.GRAD`
            for one that requires gradients while they are recorded, saying which.

    Example:
        >>> with torch.no_grad():
        ...     spec = spec_of((torch.zeros(2, 3),), {"scale": 0.5})
        >>> print(spec.text)  # doctest: +NORMALIZE_WHITESPACE +ELLIPSIS
        {"args":[{"tensor":{"dtype":"float32","shape":[2,3]}}],"kwargs":[["scale",{"float":"0x1.0000000000000p-1"}]],...}
        >>> example_of(spec, "cpu")
        ((tensor([[0., 0., 0.],
                [0., 0., 0.]]),), {'scale': 0.5})
    """
    writer = Writer()
    tree = {
        "args": [writer.write(value, f"args[{index}]") for index, value in enumerate(args)],
        "kwargs": [[name, writer.write(value, f"kwargs[{shown(name)}]")] for name, value in kwargs.items()],
        "modes": _Modes.now().tree(),
    }
    writer.place()
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    if len(text) > MOST_TEXT:
        raise Refusal(Reason.ARGUMENT, detail=f"{len(text)} characters as text, of which at most {MOST_TEXT} are kept")
    return Spec(text, writer.nbytes)


def example_of(spec: Spec, device: torch.device | str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call: zeros, laid out alike, no inference tensors, without gradients.

    Args:
        spec: Of the call.
        device: Where tensors lie; those that lay on the CPU beside others on a device lie on the CPU.

    Returns:
        Positional and keyword arguments.

    Raises:
        RuntimeError: If there is no memory for them.
    """

    def make(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], host: bool) -> Tensor:
        place = "cpu" if host else device
        with torch.inference_mode(False), torch.no_grad():
            if stride == contiguous(shape):
                return torch.zeros(shape, dtype=dtype, device=place)
            # Elements that overlap cannot be written one by one.
            return torch.zeros(extent(shape, stride), dtype=dtype, device=place).as_strided(shape, stride)

    return _arguments(spec.tree, make)


def _arguments(tree: Any, make: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if type(tree) is not dict or tree.keys() != {"args", "kwargs", "modes"}:
        raise TreeError("call", tree, "'args', 'kwargs' and 'modes'")
    reader = Reader(make)
    args = reader.read({"tuple": tree["args"]}, "args", -1)
    kwargs = reader.read({"dict": tree["kwargs"]}, "kwargs", -1)
    for name in kwargs:
        if type(name) is not str:
            raise TreeError("a key of kwargs", name, "text")
    return args, kwargs


@dataclass(frozen=True, slots=True)
class _Modes:
    grad: bool
    inference: bool
    autocast: dict[str, str]

    @classmethod
    def now(cls) -> _Modes:
        autocast = {}
        for kind in ("cuda", "cpu"):
            if torch.is_autocast_enabled(kind):
                name = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
                if name not in _AUTOCAST:
                    raise Refusal(Reason.ARGUMENT, detail=f"autocast to {name}, which cannot be told in text")
                autocast[kind] = name
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @classmethod
    def of_tree(cls, tree: Any) -> _Modes:
        if type(tree) is not dict or tree.keys() != {"grad", "inference", "autocast"}:
            raise TreeError("modes", tree, "'grad', 'inference' and 'autocast'")
        for name in ("grad", "inference"):
            if type(tree[name]) is not bool:
                raise TreeError(f"modes.{name}", tree[name], "true or false")
        autocast = tree["autocast"]
        if type(autocast) is not dict or not autocast.keys() <= {"cuda", "cpu"}:
            raise TreeError("modes.autocast", autocast, "'cuda', 'cpu', both or neither")
        for kind, name in autocast.items():
            if type(name) is not str or name not in _AUTOCAST:
                raise TreeError(f"modes.autocast.{kind}", name, f"one of {', '.join(_AUTOCAST)}")
        return cls(tree["grad"], tree["inference"], dict(autocast))

    def tree(self) -> dict[str, Any]:
        return {"grad": self.grad, "inference": self.inference, "autocast": self.autocast}
