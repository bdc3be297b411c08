"""What stands between a protocol and whoever answers: models by name and version, tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TensorMetadata:
    """One input or output of a model.

    Args:
        name: Of the tensor.
        dtype: As PyTorch calls it, ``"float32"``.
        shape: -1 where any size goes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """What a model takes and gives.

    Args:
        name: Under which it is served.
        versions: All that are served, oldest first.
        inputs: In the order of the module's arguments.
        outputs: In the order of its answer.
        platform: What runs it, such as ``"tensorrt"`` or ``"pytorch"``.
    """

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    platform: str


class Backend(Protocol):
    """Answers requests. A protocol in front of it knows neither replicas nor graphs, and it knows no transport.

    Every method but :meth:`names` raises :class:`~graphcache.errors.UnknownModelError` for a model or a version that
    it does not serve, and :class:`~graphcache.errors.UnavailableError` where it could answer later.
    """

    def names(self) -> Sequence[str]:
        """The models that are served."""

    async def is_ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model is prepared and answers now."""

    async def describe(self, name: str, version: str | None = None) -> ModelSpec:
        """What a model takes and gives.

        Args:
            name: Of the model.
            version: None for the newest.
        """

    async def infer(self, name: str, version: str | None, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run a model once.

        Args:
            name: Of the model.
            version: None for the newest.
            inputs: Tensors in host memory, by name. They may be shared with a network buffer: read only.

        Returns:
            All outputs, in host memory, by name.

        Raises:
            InputError: If the model takes no such tensors.
        """
