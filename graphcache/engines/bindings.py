"""The named inputs and outputs of an engine, and the checks of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from graphcache.errors import (
    ConfigError,
    EngineError,
    InputCountError,
    InputDeviceError,
    InputDtypeError,
    InputRankError,
    InputTypeError,
    ProfileRangeError,
    shown,
)


@dataclass(frozen=True, slots=True)
class Binding:
    """One input or output of an engine."""

    name: str
    is_input: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Sizes as built; -1 where they depend on the call."""
    on_host: bool
    """Whether TensorRT reads or writes it in host memory (a shape tensor)."""
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of an input, for each profile and axis the smallest and largest size; of a host shape tensor, of its values."""

    def sizes(self, value: Tensor) -> Sequence[int]:
        """What a profile bounds of an input: its shape, or its values if TensorRT reads them on the host."""
        return value.flatten().tolist() if self.on_host else value.shape

    def fits(self, sizes: Sequence[int], profile: int) -> bool:
        """Whether every size lies inside a profile."""
        return all(low <= size <= high for size, (low, high) in zip(sizes, self.ranges[profile], strict=False))


def read_bindings(engine: Any, trt: Any) -> tuple[Binding, ...]:
    """The bindings of a deserialised engine, in its own order."""
    return tuple(_read(engine, trt, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors))


def check_inputs(engine_name: str, bindings: Sequence[Binding], inputs: Sequence[Any], device: torch.device) -> None:
    """Compare inputs with their bindings, all but the profile ranges."""
    if len(inputs) != len(bindings):
        names = ", ".join(binding.name for binding in bindings)
        raise InputCountError(f"{engine_name} takes {len(bindings)} inputs ({names}), {len(inputs)} were given")
    for binding, value in zip(bindings, inputs, strict=True):
        label = f"input {binding.name!r} of {engine_name}"
        if not isinstance(value, Tensor):
            raise InputTypeError(
                f"{label} is of type {type(value).__name__}; expected a torch.Tensor of {binding.dtype}"
            )
        is_plain = value.layout is torch.strided and not (value.is_nested or is_lazy(value) or value._is_zerotensor())
        if not is_plain or (value.numel() > 0 and not value.untyped_storage().nbytes()):
            raise InputTypeError(f"{label} is not plain memory (layout {value.layout}); expected a dense torch.Tensor")
        if value.dtype is not binding.dtype:
            raise InputDtypeError(
                f"{label} is {value.dtype}, the engine takes {binding.dtype}; "
                f"convert it with .to({binding.dtype}) (nothing is cast silently)"
            )
        if value.device != device and not binding.on_host:
            raise InputDeviceError(
                f"{label} lies on {value.device}, the engine on {device}; move it with .to('{device}'), or let "
                f"graphcache.runtime.set_multi_device_safe_mode(True) move it at every call"
            )
        has_rank = value.dim() == len(binding.shape)
        if not has_rank or any(size not in (-1, got) for size, got in zip(binding.shape, value.shape, strict=True)):
            built = ", ".join("any" if size < 0 else str(size) for size in binding.shape)
            kind = ProfileRangeError if has_rank else InputRankError
            raise kind(f"{label} has shape {tuple(value.shape)}, the engine takes [{built}]")


def choose_profile(
    engine_name: str, bindings: Sequence[Binding], inputs: Sequence[Tensor], profiles: Sequence[int]
) -> int:
    """The first of some optimisation profiles that fits checked inputs."""
    sizes = [binding.sizes(value) for binding, value in zip(bindings, inputs, strict=True)]
    for profile in profiles:
        if all(binding.fits(got, profile) for binding, got in zip(bindings, sizes, strict=True)):
            return profile
    for binding, got in zip(bindings, sizes, strict=True):
        if not any(binding.fits(got, profile) for profile in profiles):
            raise out_of_range(engine_name, binding, got, sorted(set(profiles)))
    raise ProfileRangeError(
        f"each input of {engine_name} fits some optimisation profile, but no single profile fits them all: "
        + "; ".join(f"{binding.name} is {tuple(got)}" for binding, got in zip(bindings, sizes, strict=True))
        + ". Rebuild the engine with a profile that covers them together"
    )


def out_of_range(
    engine_name: str, binding: Binding, sizes: Sequence[int], profiles: Sequence[int]
) -> ProfileRangeError:
    """The error for an input that lies outside some profiles."""
    ranges = "; ".join(
        f"profile {profile}: "
        + " x ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in binding.ranges[profile])
        for profile in profiles
    )
    seen = f"values {list(sizes)}" if binding.on_host else f"shape {tuple(sizes)}"
    return ProfileRangeError(
        f"input {binding.name!r} of {engine_name} has {seen}, outside the engine's range ({ranges}); "
        f"rebuild the engine with shapes that cover it, or split the call"
    )


def sizes_of(engine_name: str, binding: Binding, value: Any) -> tuple[int, ...]:
    """The sizes that a shape or a tensor gives for an input, before there is memory of that size.

    For a host shape tensor they are its values; ``None`` stands for a shape that is fixed.
    """
    label = f"input {binding.name!r} of {engine_name}"
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if value is None:
        if -1 in binding.shape or binding.on_host:
            raise InputCountError(f"{label} is missing; its shape {binding.shape} is open")
        return binding.shape
    if not is_shape(value):
        raise ConfigError(f"{label} was given {shown(value)}; expected a shape, such as (8, 64), or a tensor")
    wanted = math.prod(binding.shape) if binding.on_host else len(binding.shape)
    if len(value) != wanted:
        what = "values" if binding.on_host else "dimensions"
        raise InputRankError(f"{label} was given {tuple(value)}, {len(value)} {what}; the engine takes {wanted}")
    profiles = range(len(binding.ranges))
    if not any(binding.fits(value, profile) for profile in profiles):
        raise out_of_range(engine_name, binding, value, profiles)
    return tuple(value)


def is_shape(value: Any) -> bool:
    """Whether something is a sequence of sizes."""
    return isinstance(value, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value
    )


def torch_dtype(trt: Any, dtype: Any, name: str) -> torch.dtype:
    """The torch dtype of a TensorRT dtype; an ``EngineError`` if torch has none that is laid out the same."""
    torch_type: torch.dtype | None = getattr(torch, _DTYPES.get(str(dtype).rsplit(".", 1)[-1], ""), None)
    if torch_type is None:
        raise EngineError(
            f"binding {name!r} has the TensorRT dtype {dtype}, which torch {torch.__version__} cannot hold; "
            f"rebuild the engine with a cast to one of {', '.join(sorted(_DTYPES))} at this binding"
        )
    return torch_type


_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "E8M0": "float8_e8m0fnu",
}


def _read(engine: Any, trt: Any, name: str) -> Binding:
    """One binding of a deserialised engine."""
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
    shape = tuple(engine.get_tensor_shape(name))
    ranges = []
    if is_input:
        for profile in range(engine.num_optimization_profiles):
            if on_host:
                low, _, high = _profile_values(engine, name, profile) or ((), (), ())
            else:
                low, _, high = engine.get_tensor_profile_shape(name, profile)
            ranges.append(tuple((int(a), int(b)) for a, b in zip(low, high, strict=True)))
    dtype = torch_dtype(trt, engine.get_tensor_dtype(name), name)
    return Binding(name, is_input, dtype, shape, on_host, tuple(ranges))


def _profile_values(engine: Any, name: str, profile: int) -> Any:
    """Smallest, usual and largest values of a host shape tensor."""
    try:
        # The order in TensorRT-RTX 1.5 and TensorRT 11; their documentation has the other one.
        return engine.get_tensor_profile_values(profile, name)
    except TypeError:
        return engine.get_tensor_profile_values(name, profile)
