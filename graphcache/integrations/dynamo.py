"""``torch.compile(module, backend="graphcache")``: CUDA graphs of what Dynamo traces, for each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcache.errors import ConfigError
from graphcache.events import fork_safe_lock
from graphcache.modules.wrapping import wrap


def graphcache_backend(
    traced: fx.GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile what Dynamo has traced, and answer its calls with CUDA graphs; a backend of ``torch.compile``.

    Dynamo's guards decide which trace runs. Each trace has a cache of graphs of its own, by shape, for as long as
    Dynamo keeps it. Parameters and buffers are read where they are; once they are replaced, a graph is captured anew.

    Args:
        traced: The trace.
        examples: The inputs that it was traced with, parameters and buffers among them.
        options: Those of :func:`graphcache.wrap`, and ``compiler``, which compiles the trace before: another backend of
            ``torch.compile`` by name, ``"eager"`` for none, or a function of the trace and the examples. Unless given,
            it is ``"inductor"`` on CUDA, and ``"eager"`` on the CPU, where no graph holds what Inductor compiles.

    Raises:
        ConfigError: For an unknown option, a bad value or an unknown compiler.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(4, 2).requires_grad_(False)
        >>> fast = torch.compile(net, backend=graphcache_backend, options={"compiler": "eager", "max_graphs": 8})
        >>> fast(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """
    chosen = dict(options or {})
    on_cuda = any(isinstance(each, Tensor) and each.is_cuda for each in examples)
    compiled = _compiler(chosen.pop("compiler", "inductor" if on_cuda else "eager"))(traced, examples)
    held = {
        place: each
        for place, each in enumerate(examples)
        if isinstance(each, Tensor) and (isinstance(each, nn.Parameter) or _is_static(each))
    }
    fast = wrap(_Trace(compiled, held, len(examples)), **chosen)
    lock = fork_safe_lock()

    def run(*args: Any) -> Any:
        # Modules of one class share a trace, which holds the tensors of one of them at a time.
        with lock:
            for place, before in held.items():
                if args[place] is not before:
                    held[place] = args[place]
            return fast(*[each for place, each in enumerate(args) if place not in held])

    return run


class _Trace(nn.Module):
    """What was compiled, as a module of the inputs that are not ``held``."""

    def __init__(self, compiled: Callable[..., Any], held: dict[int, Tensor], count: int) -> None:
        super().__init__()
        self.__dict__.update(compiled=compiled, held=held, count=count)

    def forward(self, *args: Any) -> Any:
        given = iter(args)
        held: dict[int, Tensor] = self.__dict__["held"]
        return self.__dict__["compiled"](
            *[held[place] if place in held else next(given) for place in range(self.__dict__["count"])]
        )


def _compiler(compiler: Any) -> Callable[..., Any]:
    if callable(compiler):
        return compiler  # type: ignore[no-any-return]
    if compiler == "eager":
        return _eager
    if compiler == "graphcache" or compiler not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(
            f"compiler={compiler!r}: expected 'inductor', 'eager', another backend of torch.compile, or a function"
        )
    return torch._dynamo.lookup_backend(compiler)


def _eager(traced: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    # A lazy trace writes its code when it is first asked for, which would be an effect of the first call.
    traced.code  # noqa: B018
    return traced


def _is_static(tensor: Tensor) -> bool:
    """Whether Dynamo takes an input for one that stays where it is, such as a buffer."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None
