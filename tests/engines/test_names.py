"""The stand-in for TensorRT says nothing that TensorRT does not: names, arguments and their order, class by class.

What graphcache calls, it calls on the stand-in in these tests, so that its calls are those of the real classes too. The
bindings tell their signatures in their docstrings.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import graphcache
from tests.engines import fake_tensorrt

FLAVOURS = ("tensorrt_rtx", "tensorrt_lean")
ONLY_RTX = {
    "IRuntimeCache",
    "EngineInspector",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "Runtime.get_engine_validity",
    "Refitter",
    "LayerInformationFormat",
}
"""What the lean runtime does without; graphcache asks before it uses these, or TensorRT raises."""
OWN = {"Violation", "IO", "Network", "Dims", "Severity"}
"""Classes of the stand-in itself. ``Dims`` and ``Severity`` stand for more or for nested ones."""
SWAPPED = {"ICudaEngine.get_tensor_profile_values"}
"""Declared the other way round than documented; :func:`graphcache.engines.bindings.read_bindings` takes both."""


def classes() -> list[str]:
    found = vars(fake_tensorrt).items()
    return [name for name, each in found if inspect.isclass(each) and each.__module__ == fake_tensorrt.__name__]


def members(name: str) -> list[str]:
    """The public members of a class of the stand-in."""
    cls = getattr(fake_tensorrt, name)
    return [each for each in vars(cls) if not each.startswith("_") and each not in ("made", "engine")]


CASES = [
    (flavour, f"{name}.{member}" if member else name)
    for flavour in FLAVOURS
    for name in classes()
    if name not in OWN and not name.startswith("_")
    for member in ("", *members(name))
]


def real(flavour: str, path: str) -> Any:
    module = pytest.importorskip(flavour)
    if flavour == "tensorrt_lean" and (path in ONLY_RTX or path.split(".")[0] in ONLY_RTX):
        pytest.skip("the lean runtime has none")
    found = module
    for name in path.split("."):
        assert hasattr(found, name), f"{flavour} has no {path}"
        found = getattr(found, name)
    return found


def arguments(documented: str, name: str) -> list[list[str]]:
    """The names of the arguments that a docstring of pybind11 tells, without ``self``, for each overload."""
    found = []
    for line in documented.splitlines():
        told = re.match(rf"(?:\d+\. )?{name}\((.*)\)(?: -> .*)?$", line)
        if told and "*args" not in told[1]:
            found.append([each for each in re.findall(r"(?:^|, )(\w+):", told[1]) if each != "self"])
    return found


@pytest.mark.parametrize(("flavour", "path"), CASES)
def test_what_the_stand_in_has_tensorrt_has(flavour: str, path: str) -> None:
    found = real(flavour, path)
    ours: Any = fake_tensorrt
    for name in path.split("."):
        ours = inspect.getattr_static(ours, name)
    if inspect.isfunction(ours) and path not in SWAPPED:
        mine = [each for each in inspect.signature(ours).parameters if each != "self"]
        told = arguments(found.__doc__ or "", path.split(".")[-1])
        assert not told or any(mine == each[: len(mine)] for each in told), f"{flavour}.{path} takes {told}"


def test_signatures_are_read_off_the_docstrings() -> None:
    text = "f(self: a.B, name: str, x: typing.SupportsInt = 3) -> bool\n\nWhat it does (always)."
    assert arguments(text, "f") == [["name", "x"]]
    text = "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: a.B, name: str) -> None\n\n2. f(self: a.B) -> str"
    assert arguments(text, "f") == [["name"], []]
    rtx = pytest.importorskip("tensorrt_rtx")
    told = arguments(rtx.IExecutionContext.set_input_shape.__doc__, "set_input_shape")
    assert ["name", "shape"] in told


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_numbers_of_enumerations_are_theirs(flavour: str) -> None:
    module = pytest.importorskip(flavour)
    for name in ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "LayerInformationFormat"):
        theirs = getattr(module, name).__members__
        for member in getattr(fake_tensorrt, name):
            assert int(theirs[member.name]) == int(member), f"{flavour}.{name}.{member.name}"


def used() -> set[str]:
    """Names that the engine room takes from TensorRT's module itself."""
    found = set()
    for path in (Path(graphcache.__file__).parent / "engines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("trt", "self.trt", "engine.trt"):
                found.add(node.attr)
    return found


def test_every_name_that_is_taken_from_the_module_is_there() -> None:
    names = used()
    assert {"Runtime", "IOutputAllocator", "Refitter", "LayerInformationFormat"} <= names
    rtx = pytest.importorskip("tensorrt_rtx")
    assert [name for name in sorted(names) if not hasattr(rtx, name)] == []


def test_the_check_can_fail() -> None:
    rtx = importlib.util.find_spec("tensorrt_rtx")
    if rtx is None:
        pytest.skip("no TensorRT-RTX")
    with pytest.raises(AssertionError, match=r"tensorrt_rtx has no IExecutionContext\.nothing"):
        real("tensorrt_rtx", "IExecutionContext.nothing")
