"""Layers, import cycles, and how long files and functions are.

A layer imports only layers below it, wherever in the file the import stands.
"""

import ast
from pathlib import Path

import pytest

import graphcache
from tests.test_import import imported

PACKAGE = Path(graphcache.__file__).parent

# Layers of one rank do not import each other, but for those of rank 0.
RANKS = {
    "errors": 0,
    "config": 0,
    "events": 0,
    "version": 0,
    "extras": 0,
    "files": 0,
    "features": 0,
    "fields": 0,
    "native": 0,
    "keys": 1,
    "cache": 2,
    "graphs": 2,
    "engines": 2,
    "capture": 3,
    "dispatch": 4,
    "modules": 5,
    "loops": 6,
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
"""The only layer that imports a library."""


def layer_of(module):
    """``"graphcache.cache.graph_cache"`` -> ``"cache"``, ``"graphcache"`` -> ``""``."""
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
                # ``from graphcache import cache`` imports a layer, ``from graphcache import wrap`` the package.
                is_layer = base == "graphcache" and alias.name in RANKS
                yield f"{base}.{alias.name}" if is_layer else base, node.lineno
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
    own = layer_of(module)
    if own not in RANKS:
        return [f"{module}: the layer {own!r} has no rank; give it one in RANKS"]
    found = []
    for name, line in imports(source, module, is_package=is_package):
        top = name.split(".")[0]
        if top == "graphcache":
            other = layer_of(name)
            both_lowest = RANKS.get(other) == RANKS[own] == 0
            if other not in RANKS:
                found.append(f"{module}:{line} imports {name}, a layer without a rank")
            elif other != own and RANKS[other] >= RANKS[own] and not both_lowest:
                found.append(f"{module}:{line} imports {name}, which is not below {own or 'the package'}")
        elif top in OWNERS and OWNERS[top] != own:
            found.append(f"{module}:{line} imports {name}, which is for {OWNERS[top]} only")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_layer_imports_only_layers_below(path):
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_of(path), is_package=path.name == "__init__.py") == []


def test_an_engines_module_imports_nothing_that_imports_the_cache_of_graphs():
    """Also inside functions and for types alone: what is above it is given to it through ``features``."""
    files = {module_of(path): path for path in FILES}
    found = {"graphcache"}
    left = [f"graphcache.{name}" for name in ("modules.engine", "capture.engine_recorder", "export.op_kernel")]
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


def test_every_layer_has_been_looked_at():
    seen = {layer_of(module_of(path)) for path in FILES}
    assert {"cache", "graphs", "engines", "modules", "runtime", "observe", "debug", "cli", ""} <= seen


TESTS = Path(__file__).parent
OTHER_TESTS = {"bench", "contracts", "gpu"}
"""Folders of tests that are of no layer."""


def test_folders_of_tests_are_layers():
    folders = {path.name for path in TESTS.iterdir() if (path / "__init__.py").is_file()}
    assert folders - OTHER_TESTS <= {name for name in RANKS if (PACKAGE / name).is_dir()}


# ---- import cycles


def edges(sources):
    """From each file to the files it imports, also under ``TYPE_CHECKING`` and inside functions.

    Args:
        sources: Source by module name; packages under their own name.
    """
    packages = {name.rpartition(".")[0] for name in sources}
    found = {}
    for module, source in sources.items():
        found[module] = set()
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.ImportFrom):
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + (module in packages)] if node.level else []
                base = ".".join([*kept, *([node.module] if node.module else [])])
                # Of a package, either one of its files or what is in its __init__.
                names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources else base for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            found[module].update(name for name in names if name in sources and name != module)
    return found


def cycles(graph):
    """The strongly connected components of more than one file, by the algorithm of Tarjan."""
    index, low, stack, found = {}, {}, [], []

    def visit(file):
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in graph[file]:
            if other not in index:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == index[file]:
            place = stack.index(file)
            component = stack[place:]
            del stack[place:]
            if len(component) > 1:
                found.append(sorted(component))

    for file in graph:
        if file not in index:
            visit(file)
    return found


def test_no_files_import_each_other_in_a_cycle():
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in FILES}
    graph = edges(sources)
    assert len(graph["graphcache"]) > 20
    assert cycles(graph) == []


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("from p.b import x", "import p.a"),
        ("from p import b", "from p.a import x"),
        ("from . import b", "from .a import x"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import b", "from p import a"),
        ("def f():\n    import p.b", "def g():\n    from p.a import f"),
        ("import importlib\nimportlib.import_module('p.b')", "import p.a"),
    ],
)
def test_a_cycle_is_found(source, other):
    assert cycles(edges({"p": "", "p.a": source, "p.b": other})) == [["p.a", "p.b"]]


def test_a_cycle_of_three_and_none():
    three = {"p": "", "p.a": "import p.b", "p.b": "import p.c", "p.c": "import p.a", "p.d": "import p.a"}
    assert cycles(edges(three)) == [["p.a", "p.b", "p.c"]]
    assert cycles(edges({**three, "p.c": ""})) == []


# ---- what importing graphcache imports

ONLY_WHEN_NEEDED = {
    "click",
    "cuda",
    "ray",
    "rich",
    "sympy",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_rtx",
}


def test_importing_graphcache_imports_no_library_that_only_some_calls_need():
    found = imported("import graphcache")
    assert "graphcache.dispatch.dispatcher" in found
    assert {name.split(".")[0] for name in found} & ONLY_WHEN_NEEDED == set()
    assert not {name for name in found if name.startswith("torch._dynamo")}


# ---- sizes

MOST_LINES_OF_A_FILE = 400
LONG_FILES: dict[str, int] = {}
"""Files that are longer, with their lines. There are none."""

MOST_LINES_OF_A_FUNCTION = 70
LONG_FUNCTIONS: dict[str, int] = {}
"""Functions that are longer, docstring included. Entries may only shrink or go."""


def long_files():
    """Lines of the files of the package, native code too, that have too many."""
    files = [*FILES, *(path for path in PACKAGE.rglob("*") if path.suffix in {".c", ".cc", ".cpp", ".cu", ".h"})]
    counted = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return {name: lines for name, lines in counted.items() if lines > MOST_LINES_OF_A_FILE}


def long_functions():
    """Lines of the functions of the package that have too many; of several of one name in a file, the most."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines, name = node.end_lineno - node.lineno + 1, f"{path.relative_to(PACKAGE)}:{node.name}"
                if lines > MOST_LINES_OF_A_FUNCTION:
                    found[name] = max(lines, found.get(name, 0))
    return found


@pytest.mark.parametrize(("count", "allowed"), [(long_files, LONG_FILES), (long_functions, LONG_FUNCTIONS)])
def test_nothing_is_longer_than_it_should_be_but_for_what_was(count, allowed):
    found = count()
    grown = {name: lines for name, lines in found.items() if lines > allowed.get(name, 0)}
    assert grown == {}, "too long: divide it, or make it shorter"
    assert set(allowed) <= set(found), "no longer too long: take it out of the list"


# ---- the checks find what they look for


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("graphcache.cache.graph_cache", "from graphcache.graphs.cuda import CudaGraph", "which is not below cache"),
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
        ("graphcache.errors", "from graphcache.cache import graph_cache", "which is not below errors"),
        ("graphcache.modules.engine", "import tensorrt_rtx", "which is for engines only"),
        ("graphcache.engines.engine", "from cuda.bindings import driver", "which is for graphs only"),
        (
            "graphcache.cache.graph_cache",
            "import importlib\nimportlib.import_module('cuda.bindings')",
            "graph_cache:2 imports cuda",
        ),
        ("graphcache.modules.cached_module", "import click", "which is for cli only"),
        ("graphcache.attic.box", "", "has no rank"),
        ("graphcache.cli.demo", "import graphcache.attic", "a layer without a rank"),
    ],
)
def test_what_breaks_the_order_is_found(module, source, message):
    [found] = violations(source, module)
    assert message in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graphcache.cache.graph_cache", "from graphcache.errors import Reason\nfrom graphcache.cache import blocks"),
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
