"""CUDA graphs for ``model.generate(...)`` of Transformers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphcache.config import graphs_off
from graphcache.errors import ConfigError, shown
from graphcache.keys.values import MISSING
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls
from graphcache.modules.wrapping import wrap

_OWN = ("generate", "_prefill", "_prepare_static_cache", "_previous_max_cache_length")
"""Attributes of the model that are set meanwhile; Transformers sets the last one."""


def enable_generation_graphs(
    model: nn.Module, *, round_to: int = 64, max_caches: int = 4, **options: Any
) -> GenerationGraphs:
    """Make ``model.generate(...)`` decode with CUDA graphs, until the returned object is closed.

    The prompt runs eagerly. Each further token is a call of one graph, which updates a static KV cache in place. Caches
    are kept and used again, so that a second ``generate`` of the same sizes captures nothing. ``generate`` takes what
    it takes otherwise, and gives the tokens that it gives with ``cache_implementation="static"`` and a cache of that
    length. It runs without graphs with beams, with an assistant model and with ``use_cache=False``. Layers with a
    sliding window count in Python, and so run eagerly.

    Args:
        model: A model of Transformers that generates; changed in place.
        round_to: Lengths of caches are multiples of it, in tokens, so that similar lengths share a cache and a graph.
        max_caches: How many caches are kept that nobody uses.
        options: As for :func:`graphcache.wrap`.

    Raises:
        ConfigError: If the model does not generate, or has graphs already.

    Example:
        >>> import torch, graphcache
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from graphcache.integrations.transformers import enable_generation_graphs
        >>> config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(config).eval().requires_grad_(False)
        >>> with enable_generation_graphs(model) as graphs:
        ...     tokens = model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=8, max_new_tokens=8)
        >>> tuple(tokens.shape)
        (1, 11)
    """
    return GenerationGraphs(model, round_to, max_caches, options)


class GenerationGraphs:
    """The graphs of one model that generates; :meth:`close` undoes everything. ``fast`` is the wrapped model."""

    def __init__(self, model: nn.Module, round_to: int, max_caches: int, options: dict[str, Any]) -> None:
        missing = [name for name in _OWN[:3] if not callable(getattr(model, name, None))]
        if missing or isinstance(model, CachedModule):
            raise ConfigError(
                f"expected a model of Transformers that generates, not wrapped; got {type(model).__name__}"
                + (f" without {', '.join(missing)}" if missing else "")
            )
        if _OWN[0] in vars(model):
            raise ConfigError(f"generate of this {type(model).__name__} was replaced already; close what replaced it")
        for name, value, least in (("round_to", round_to, 1), ("max_caches", max_caches, 0)):
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={shown(value)}: expected a whole number, {least} or more")
        self._model, self._round_to, self._max_caches = model, round_to, max_caches
        ignored = [f"self.{name}" for name in _OWN]
        ignore = options.get("ignore", ())
        # What is no sequence of paths is refused there.
        is_several = isinstance(ignore, (list, tuple))
        self.fast = wrap(model, **{**options, "ignore": [*ignored, *ignore] if is_several else ignore})
        self._free: OrderedDict[tuple[Any, ...], list[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._before = {name: vars(model).get(name, MISSING) for name in _OWN}
        self._plain, self._prefill, self._make = (getattr(model, name) for name in _OWN[:3])
        # With the graphs, as long as the model's own method is what the name gives.
        self._with_graphs: Callable[..., Any] = self.fast.generate
        for name, function in zip(_OWN[:3], (self._generate, self._run_prefill, self._cache), strict=True):
            vars(model)[name] = _Instead(model, name, function)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was, and drop graphs and caches; again does nothing."""
        for name, value in self._before.items():
            if value is not MISSING:
                vars(self._model)[name] = value
            else:
                with suppress(KeyError):
                    del vars(self._model)[name]
        self._before = {}
        self._free.clear()
        controls(self.fast).close()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``generate`` of the model."""
        if not self._applies(kwargs):
            return self._plain(*args, **kwargs)
        if kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
            kwargs.setdefault("cache_implementation", "static")
        kwargs.setdefault("disable_compile", True)
        taken: list[tuple[tuple[Any, ...], Any]] = []
        token = _taken.set(taken)
        try:
            answer = self._with_graphs(*args, **kwargs)
        finally:
            _taken.reset(token)
        if isinstance(answer, Tensor):
            # Otherwise the caller has the cache.
            self._give_back(taken)
        return answer

    def _applies(self, kwargs: dict[str, Any]) -> bool:
        config = kwargs.get("generation_config") or getattr(self._model, "generation_config", None)
        found = {name: kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "use_cache")}
        return (found["num_beams"] or 1) == 1 and found["use_cache"] is not False and not kwargs.get("assistant_model")

    def _run_prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for the model's method that runs the prompt: a graph of each length would hardly be used."""
        with graphs_off():
            return self._prefill(*args, **kwargs)

    def _cache(self, cache_implementation: str, batch_size: int, max_cache_len: int, **kwargs: Any) -> Any:
        """Stands for the model's method that makes a static cache; gives one that was used before, reset, if it can."""
        length = -(-max_cache_len // self._round_to) * self._round_to
        encoded = kwargs.get("model_kwargs", {}).get("encoder_outputs")
        about: tuple[Any, ...] = cache_implementation, batch_size, length
        about += None if encoded is None else encoded[0].shape[1], torch.is_inference_mode_enabled()
        about += getattr(self._model, "dtype", None), getattr(self._model, "device", None)
        with self._lock:
            free = self._free.get(about)
            cache = free.pop() if free else None
        if cache is None:
            cache = self._make(cache_implementation, batch_size, length, **kwargs)
        else:
            cache.reset()
        if (taken := _taken.get()) is not None:
            taken.append((about, cache))
        return cache

    def _give_back(self, taken: list[tuple[tuple[Any, ...], Any]]) -> None:
        with self._lock:
            for about, cache in taken:
                self._free.setdefault(about, []).append(cache)
                self._free.move_to_end(about)
            while sum(map(len, self._free.values())) > self._max_caches:
                oldest = next(iter(self._free))
                self._free[oldest].pop(0)
                if not self._free[oldest]:
                    del self._free[oldest]


class _Instead:
    """Stands for a method of a model. In a copy or a pickle of the model, it is the method."""

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._model, self._name, self._function = model, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._model, self._name)


_taken: ContextVar[list[tuple[tuple[Any, ...], Any]] | None] = ContextVar("graphcache_caches", default=None)
"""The caches that the ``generate`` under way has taken."""
