"""A room imports only rooms below it, wherever in the file the import stands."""

import ast
from pathlib import Path

import pytest

import graphcache

PACKAGE = Path(graphcache.__file__).parent

# Rooms of one rank do not import each other, but for those of the ground floor.
RANKS = {
    "errors": 0,
    "config": 0,
    "events": 0,
    "version": 0,
    "extras": 0,
    "files": 0,
    "compiled_library": 0,
    "factories": 0,
    "features": 0,
    "fields": 0,
    "keys": 1,
    "cache": 2,
    "graphs": 2,
    "engines": 2,
    "capture": 3,
    "dispatch": 4,
    "modules": 5,
    "persist": 6,
    "buckets": 6,
    "export": 6,
    "integrations": 6,
    "runtime": 6,
    "observe": 7,
    "debug": 8,
    "": 9,
    "serving": 10,
    "cli": 11,
    "__main__": 12,
}
"""``""`` is the package itself, which gathers the public names."""

OWNERS = {
    "tensorrt": "engines",
    "tensorrt_rtx": "engines",
    "tensorrt_lean": "engines",
    "cuda": "graphs",
    "click": "cli",
    "rich": "cli",
    "ray": "serving",
    "starlette": "serving",
    "safetensors": "persist",
    "filelock": "engines",
    "jinja2": "observe",
    "matplotlib": "observe",
    "nvtx": "observe",
    "prometheus_client": "observe",
}
"""The only room that imports a library."""

ALSO = {("graphcache.modules.progress", "rich")}
"""Who else may, inside a function: a bar that is drawn on a terminal alone."""


def room_of(module):
    """``"graphcache.cache.lru"`` -> ``"cache"``, ``"graphcache"`` -> ``""``."""
    return [*module.split("."), ""][1]


def module_of(path):
    """The name under which a file of the package is imported."""
    parts = ["graphcache", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, module, *, is_package):
    """Every module that some source imports, by statement or by name, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                # ``from graphcache import cache`` imports a room, ``from graphcache import wrap`` the package.
                is_room = base == "graphcache" and alias.name in RANKS
                yield f"{base}.{alias.name}" if is_room else base, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield argument.value, node.lineno


def violations(source, module, *, is_package=False):
    """What in some source breaks the order, in words."""
    own = room_of(module)
    if own not in RANKS:
        return [f"{module}: the room {own!r} has no place in the order; give it one in RANKS"]
    found = []
    for name, line in imports(source, module, is_package=is_package):
        top = name.split(".")[0]
        if top == "graphcache":
            other = room_of(name)
            ground_floor = RANKS.get(other) == RANKS[own] == 0
            if other not in RANKS:
                found.append(f"{module}:{line} imports {name}, a room without a place in the order")
            elif other != own and RANKS[other] >= RANKS[own] and not ground_floor:
                found.append(f"{module}:{line} imports {name}, which is not below {own or 'the package'}")
        elif top in OWNERS and OWNERS[top] != own and (module, top) not in ALSO:
            found.append(f"{module}:{line} imports {name}, which is for {OWNERS[top]} only")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_room_imports_only_rooms_below(path):
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_of(path), is_package=path.name == "__init__.py") == []


def test_an_engines_module_imports_nothing_that_imports_the_cache_of_graphs():
    """Also inside functions and for types alone: what is above it is given to it through ``hooks``."""
    files = {module_of(path): path for path in FILES}
    found = {"graphcache"}
    left = [f"graphcache.{name}" for name in ("modules.engine", "modules.shared_contexts", "export.op_kernel")]
    while left:
        module = left.pop()
        if module in found or module not in files:
            continue
        found.add(module)
        tree = ast.parse(files[module].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "graphcache.modules.engine_runner" in found
    assert "graphcache.modules.cached_module" not in found


def test_every_room_has_been_looked_at():
    seen = {room_of(module_of(path)) for path in FILES}
    assert {"cache", "graphs", "engines", "modules", "runtime", "observe", "debug", "cli", ""} <= seen


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("graphcache.cache.lru", "from graphcache.graphs.cuda import CudaGraph", "which is not below cache"),
        ("graphcache.graphs.cuda", "def f():\n    import graphcache.engines.engine", "graphs.cuda:2 imports"),
        ("graphcache.engines.engine", "from graphcache import cache", "imports graphcache.cache, which is not below"),
        ("graphcache.engines.engine", "from ..modules import cached", "imports graphcache.modules, which"),
        ("graphcache.modules.cached_module", "from graphcache import runtime", "imports graphcache.runtime"),
        ("graphcache.modules.cached_module", "from .. import runtime", "imports graphcache.runtime"),
        ("graphcache.modules.cached_module", "import graphcache", "imports graphcache, which is not below modules"),
        ("graphcache.modules.cached_module", "from graphcache.observe import metrics", "which is not below modules"),
        (
            "graphcache.modules.cached_module",
            "from graphcache.persist.saving import save",
            "which is not below modules",
        ),
        ("graphcache.modules.cached_module", "from graphcache.buckets import bucketed", "which is not below modules"),
        ("graphcache.observe.metrics", "from graphcache.cli import output", "which is not below observe"),
        ("graphcache.observe.metrics", "from graphcache import debug", "which is not below observe"),
        ("graphcache.cli.bench", "import matplotlib", "which is for observe only"),
        ("graphcache.runtime", "import graphcache.cli.demo", "imports graphcache.cli.demo"),
        ("graphcache.serving.app", "from graphcache.cli import main", "imports graphcache.cli"),
        ("graphcache.errors", "from graphcache.cache import lru", "which is not below errors"),
        ("graphcache.modules.engine", "import tensorrt_rtx", "which is for engines only"),
        ("graphcache.engines.engine", "from cuda.bindings import driver", "which is for graphs only"),
        ("graphcache.cache.lru", "import importlib\nimportlib.import_module('cuda.bindings')", "lru:2 imports cuda"),
        ("graphcache.modules.cached_module", "import click", "which is for cli only"),
        ("graphcache.attic.box", "", "has no place in the order"),
        ("graphcache.cli.demo", "import graphcache.attic", "a room without a place in the order"),
    ],
)
def test_what_breaks_the_order_is_found(module, source, message):
    [found] = violations(source, module)
    assert message in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graphcache.cache.lru", "from graphcache.errors import Reason\nfrom graphcache.cache import blocks"),
        ("graphcache.config", "from graphcache.errors import ConfigError"),
        ("graphcache.modules.cached_module", "from graphcache.graphs import host\nfrom . import engine"),
        ("graphcache.cli.demo", "import graphcache\nfrom graphcache import Reason\nimport rich.table"),
        ("graphcache.engines.library", "import tensorrt"),
        ("graphcache.observe.metrics", "import prometheus_client\nfrom graphcache import runtime"),
        ("graphcache.debug", "from graphcache.observe import breaks"),
        ("graphcache.graphs.driver", "from cuda.bindings import driver"),
    ],
)
def test_what_keeps_the_order_passes(module, source):
    assert violations(source, module) == []
