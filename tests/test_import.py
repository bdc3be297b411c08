"""What ``import graphcache`` costs, and what it gives."""

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import graphcache
from graphcache.modules.transparent import Overridable

PACKAGE = Path(graphcache.__file__).parent
FORBIDDEN = (
    "cuda.bindings",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_lean",
    "click",
    "rich",
    "ray",
    "starlette",
    "graphcache.serving",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "prometheus_client",
    "nvtx",
    "graphcache.cli",
    "torch._dynamo",
    "safetensors",
)


def imported(statement):
    """The modules that a statement loads in a new interpreter, beyond those that PyTorch loads."""
    lines = ["import json, sys, torch", "before = set(sys.modules)", statement]
    code = "\n".join([*lines, "print(json.dumps(sorted(set(sys.modules) - before)))"])
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return set(json.loads(ran.stdout))


def test_importing_graphcache_loads_no_optional_library_and_no_driver():
    found = imported("import graphcache")
    assert "graphcache.modules.cached_module" in found
    assert found.isdisjoint(FORBIDDEN)


def test_the_check_can_fail():
    assert {"click", "rich", "graphcache.cli"} <= imported("import graphcache.cli")


FIRST_CALLS = """
import graphcache
x, linear = torch.ones(2, 4), torch.nn.Linear(4, 4)
for module, buckets in ((linear, {"input": {0: [4]}}), (torch.nn.GRUCell(4, 4), None), (torch.nn.Dropout(), None)):
    with torch.no_grad(), graphcache.wrap(module, buckets=buckets) as fast:
        fast(x), fast(x), fast(x[:1])
"""


def test_the_first_capture_of_a_process_imports_neither_dynamo_nor_sympy():
    found = imported(FIRST_CALLS)
    assert "graphcache.graphs.cpu_tape" in found
    assert not {name for name in found if name.split(".")[0] == "sympy" or name.startswith("torch._dynamo")}


def public():
    """Every public class and function with the name by which it is reached."""
    for name, value in vars(graphcache).items():
        if not name.startswith("_") and not inspect.ismodule(value):
            yield f"graphcache.{name}", value
    for name in graphcache.runtime.__all__:
        yield f"graphcache.runtime.{name}", getattr(graphcache.runtime, name)
    for name, value in vars(graphcache.errors).items():
        if inspect.isclass(value) and issubclass(value, graphcache.GraphCacheError):
            yield f"graphcache.errors.{name}", value


def members():
    """Every public method and property of the public classes, as far as they are graphcache's own."""
    for name, value in public():
        if inspect.isclass(value):
            own = {}
            for base in reversed(value.__mro__):
                if base.__module__.startswith("graphcache"):
                    # Most names give way to those of the module that is wrapped.
                    own.update(
                        {
                            each: kept.value if isinstance(kept, Overridable) else kept
                            for each, kept in vars(base).items()
                        }
                    )
            for member, found in own.items():
                if not member.startswith("_") and (inspect.isfunction(found) or isinstance(found, property)):
                    yield f"{name}.{member}", found


def test_there_is_something_public():
    names = [name for name, _ in [*public(), *members()]]
    assert {"graphcache.wrap", "graphcache.runtime.enable_cudagraphs", "graphcache.CachedModule.clear"} <= set(names)


@pytest.mark.parametrize(("name", "value"), list(public()), ids=[name for name, _ in public()])
def test_public_names_are_documented(name, value):
    assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"
    assert value.__module__.startswith("graphcache")


@pytest.mark.parametrize(("name", "value"), list(members()), ids=[name for name, _ in members()])
def test_public_methods_are_documented(name, value):
    if name.rsplit(".", 1)[1] != "extra_repr":
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_that_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", graphcache.__version__)
    try:
        installed = importlib.metadata.version("graphcache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("graphcache runs from its sources and is not installed")
    assert installed == graphcache.__version__
