"""Small models, what they take and give, and a backend that a test holds in its hand."""

from __future__ import annotations

import asyncio
import threading

import torch
from torch import Tensor, nn

from graphcache.errors import UnavailableError, UnknownModelError
from graphcache.serving.backend import ModelSpec, TensorMetadata
from graphcache.serving.protocol.dtypes import DTYPES
from tests.helpers import frozen


def spec(
    name: str, inputs: dict[str, tuple], outputs: dict[str, tuple], versions: tuple[str, ...] = ("1",)
) -> ModelSpec:
    """From ``{"x": ("float32", (-1, 4))}``."""
    made = [tuple(TensorMetadata(each, *given) for each, given in side.items()) for side in (inputs, outputs)]
    return ModelSpec(name, versions, *made, "pytorch")


class Policy(nn.Module):
    """Two outputs of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        return self.second(hidden), hidden.argmax(-1)


def policy() -> nn.Module:
    return frozen(Policy())


POLICY = spec("policy", {"x": ("float32", (-1, 4))}, {"action": ("float32", (-1, 2)), "best": ("int64", (-1,))})


class Echo(nn.Module):
    """One tensor of each datatype, given back."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


_EACH = {name: (str(dtype).removeprefix("torch."), (-1, -1)) for name, dtype in DTYPES.items()}
ECHO = spec("echo", _EACH, {f"{name}_OUT": each for name, each in _EACH.items()})


class Held:
    """A backend of the model ``held``, whose one call waits until it is let go.

    It counts what begins, and can be told to fail.
    """

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.cancelled = 0
        self.error: Exception | None = None

    def names(self):
        return ["held"]

    async def is_ready(self, name, version=None):
        return (await self.describe(name, version)) is not None and self.error is None

    async def describe(self, name, version=None):
        if name != "held" or version not in (None, "1", "2"):
            raise UnknownModelError(f"there is no model {name!r} of version {version}; the models are held")
        return spec("held", {"x": ("float32", (-1,))}, {"y": ("float32", (-1,))}, ("1", "2"))

    async def infer(self, name, version, inputs):
        if self.error is not None:
            raise self.error
        self.begun.release()
        try:
            await asyncio.to_thread(self.go.wait, 30)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"y": inputs["x"] + 1}


class Ready(Held):
    """One that answers at once."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.go.set()
        self.error = error


BUSY = UnavailableError("being prepared", retry_after=2.5)
X = torch.arange(3, dtype=torch.float32)
