"""Buckets of an engine, held against its bindings and optimisation profiles when it is wrapped."""

from __future__ import annotations

from graphcache.buckets.argument_ref import find_argument
from graphcache.buckets.spec import POWERS_OF_TWO, Buckets
from graphcache.capture.engine_like import EngineLike
from graphcache.engines.bindings import Binding
from graphcache.errors import ConfigError, shown


def engine_buckets(buckets: Buckets, module: EngineLike) -> Buckets:
    """The buckets that the engine takes: listed sizes must fit a profile, powers of two are chosen to."""
    inputs = module.engine.inputs
    sizes = dict(buckets.sizes)
    for key in buckets.inputs:
        ref = find_argument(key, module.input_binding_names, f"buckets[{key!r}]")
        assert ref.index is not None
        binding = inputs[ref.index]
        if binding.on_host:
            raise ConfigError(
                f"buckets[{key!r}]: {module.name} reads {binding.name!r} on the host, and its values are sizes; "
                f"expected an input on the device"
            )
        for axis, position in zip(buckets.inputs[key], buckets.places(key, len(binding.shape)), strict=True):
            where = f"buckets[{key!r}][{axis.axis}]"
            fitting = tuple(size for size in sizes[axis.symbol] if _fits(binding, position, size))
            if buckets.sizes[axis.symbol] is not POWERS_OF_TWO and fitting != sizes[axis.symbol]:
                wrong = next(size for size in sizes[axis.symbol] if size not in fitting)
                raise ConfigError(
                    f"{where}: the size {wrong}; expected one that a profile takes: {_ranges(binding, position)}"
                )
            if not fitting:
                raise ConfigError(
                    f"{where}={shown('powers_of_two')}: none of them is a size that a profile takes: "
                    f"{_ranges(binding, position)}"
                )
            sizes[axis.symbol] = fitting
    return buckets.with_sizes(sizes)


def _fits(binding: Binding, axis: int, size: int) -> bool:
    return any(low <= size <= high for low, high in (profile[axis] for profile in binding.ranges))


def _ranges(binding: Binding, axis: int) -> str:
    pairs = [profile[axis] for profile in binding.ranges]
    return ", ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in pairs)
