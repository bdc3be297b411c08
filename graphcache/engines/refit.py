"""New weights for an engine that was built to take them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache.engines.bindings import torch_dtype
from graphcache.engines.engine import Engine
from graphcache.errors import EngineError, shown


def refit(engine: Engine, weights: Mapping[str, Tensor], stream: int) -> None:
    """Replace weights of an engine, enqueued on a stream; returns once the given tensors may be changed again.

    The behaviour is undefined while work of the engine is pending on another stream
    (``IRefitter::refitCudaEngineAsync``). Its contexts stay valid.
    """
    trt = engine.trt
    with engine.collect_errors():
        refitter = engine.refitter()
        names = [] if refitter is None else list(refitter.get_all_weights())
        if not names:
            raise EngineError(
                f"{engine.name} takes no new weights; build it with refittable=True, or with the names of some weights"
            )
        given = {name: _checked(engine, refitter, names, name, value) for name, value in weights.items()}
        for name, (dtype, value) in given.items():
            if not refitter.set_named_weights(name, trt.Weights(dtype, value.data_ptr(), value.numel())):
                raise EngineError(f"{engine.name}: weights {name!r} were refused: {engine.said()}")
        if missing := list(refitter.get_missing_weights()):
            raise EngineError(
                f"{engine.name}: {', '.join(missing)} must be given together with {', '.join(given)}; nothing changed"
            )
        if not refitter.refit_cuda_engine_async(stream):
            raise EngineError(
                f"{engine.name}: TensorRT refused to refit: {engine.said()}. Some weights may have been "
                f"replaced: refit again with all of them, or load the engine again"
            )


def by_engine_names(weights: Mapping[str, Tensor], names: object) -> Mapping[str, Tensor]:
    """The same weights under an engine's own names.

    ``names`` maps them to others, or to sequences that begin with one, as Torch-TensorRT's ``weight_name_map`` does.
    Without such a mapping the names are the engine's already.
    """
    if not isinstance(names, Mapping):
        return weights
    others = {own: name[0] if isinstance(name, (list, tuple)) else name for own, name in names.items()}
    return {own: weights[name] for own, name in others.items() if name in weights} or weights


def _checked(engine: Engine, refitter: Any, names: list[str], name: str, value: Any) -> tuple[Any, Tensor]:
    """TensorRT's dtype of some weights, and their values in host memory."""
    if name not in names:
        near = difflib.get_close_matches(shown(name), names, n=3) or names[:8]
        raise EngineError(f"{engine.name} has no weights {shown(name)} to replace; it has {', '.join(near)}")
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise EngineError(
            f"{engine.name}: weights {name!r} are of type {type(value).__name__}; expected a dense torch.Tensor"
        )
    prototype = refitter.get_weights_prototype(name)
    dtype = torch_dtype(engine.trt, prototype.dtype, name)
    if value.dtype is not dtype or value.numel() != prototype.size:
        raise EngineError(
            f"{engine.name}: weights {name!r} are {value.numel()} elements of {value.dtype}; the engine was built with "
            f"{prototype.size} of {dtype}, and nothing is cast"
        )
    return prototype.dtype, value.detach().cpu().contiguous()
