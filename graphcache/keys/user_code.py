"""Which code belongs to the user, and which globals a function names."""

from __future__ import annotations

import dis
import functools
import os
import sys
import types
from typing import Any, NamedTuple

LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "scipy", "triton", "sympy", "graphcache"}
    | {"typing_extensions"}
) - {"__main__"}
"""Top-level packages whose own globals and classes are not followed: they hold no state of a user's module."""


_NOT_CALLED = frozenset(
    f"__{name}__"
    for name in (
        *("init", "new", "del", "init_subclass", "class_getitem", "repr", "str", "dir", "sizeof"),
        *("reduce", "reduce_ex", "getstate", "setstate", "copy", "deepcopy"),
    )
)
"""Special methods that a call of an object that exists does not come to by itself."""
_TRACERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.export", "torch._export")


class GlobalNames(NamedTuple):
    """The globals that a code object names."""

    loaded: frozenset[str]
    """Names that are read."""
    stored: frozenset[str]
    """Names that are assigned or deleted."""
    attributes: frozenset[tuple[str, ...]]
    """For names that are read: the attributes taken from them at once, as in ``torch.nn.functional``."""
    mentioned: frozenset[str]
    """Every name in it, of attributes and methods too, and every constant that may be one, as for ``getattr``."""
    imported: frozenset[str]
    """Modules that it imports."""


def is_library(module_name: Any) -> bool:
    """Whether code of a module is a library's, by the module's ``__name__``."""
    if not isinstance(module_name, str):
        return True
    return module_name.partition(".")[0] in LIBRARIES


def is_tracer(module_name: Any) -> bool:
    """Whether code or an object belongs to what traces and compiles modules, whose own state is no state of theirs."""
    return isinstance(module_name, str) and module_name.startswith(_TRACERS)


def runs_by_itself(name: str) -> bool:
    """Whether a method may run in a call though no code mentions its name."""
    return name == "forward" or (name.startswith("__") and name.endswith("__") and name not in _NOT_CALLED)


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> GlobalNames:
    """The globals that a code object names, with those of the functions defined inside it."""
    loaded: set[str] = set()
    stored: set[str] = set()
    attributes: set[tuple[str, ...]] = set()
    mentioned: set[str] = set()
    imported: set[str] = set()
    for each in code_inside(code):
        mentioned.update(each.co_names)
        mentioned.update(value for value in each.co_consts if type(value) is str and value.isidentifier())
        chain: tuple[str, ...] = ()
        for instruction in dis.get_instructions(each):
            name = instruction.opname
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = (instruction.argval,)
                loaded.add(instruction.argval)
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and chain:
                chain = (*chain, instruction.argval)
                attributes.add(chain)
            else:
                chain = ()
            if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                stored.add(instruction.argval)
            if name == "IMPORT_NAME":
                imported.add(instruction.argval)
    return GlobalNames(
        frozenset(loaded), frozenset(stored), frozenset(attributes), frozenset(mentioned), frozenset(imported)
    )


def has_global_state(code: types.CodeType, table: dict[str, Any]) -> bool:
    """Whether a function names a global that may hold a state: anything but functions, classes and libraries."""
    names = global_names(code)
    if names.stored or any(_may_hold_state(table[name]) for name in names.loaded if name in table):
        return True
    if names_environment(names, table) or imported_modules(names, table):
        return True
    return any(
        not is_library(module.__name__) and _may_hold_state(vars(module).get(attribute))
        for module, attribute in module_attributes(names, table)
    )


def names_environment(names: GlobalNames, table: dict[str, Any]) -> bool:
    """Whether a function names what reads the environment of the process."""
    mentions = "environ" in names.mentioned or "getenv" in names.mentioned
    return mentions or any(table.get(name) is reads for name in names.loaded for reads in (os.environ, os.getenv))


def imported_modules(names: GlobalNames, table: dict[str, Any]) -> list[types.ModuleType]:
    """The modules that a function imports, but for libraries."""
    package = str(table.get("__package__") or "")
    parts = package.split(".") if package else []
    # How many levels up an import begins is not looked at.
    prefixes = ["", *(".".join(parts[: index + 1]) for index in range(len(parts)))]
    paths = [f"{prefix}.{name}".strip(".") for name in names.imported for prefix in prefixes]
    found = [sys.modules.get(path) for path in paths if not is_library(path)]
    return [module for module in found if isinstance(module, types.ModuleType)]


def module_attributes(names: GlobalNames, table: dict[str, Any]) -> list[tuple[types.ModuleType, str]]:
    """The attributes of modules that a function names, such as ``relu`` of ``torch.nn.functional``."""
    found = []
    for first, *rest in names.attributes:
        value = table.get(first)
        for attribute in rest:
            if not isinstance(value, types.ModuleType):
                break
            found.append((value, attribute))
            value = vars(value).get(attribute)
    return found


def code_inside(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those of the functions defined inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(each for constant in inner for each in code_inside(constant))]


def _may_hold_state(value: Any) -> bool:
    return value is not None and not isinstance(
        value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    )


def function_of(attribute: Any) -> types.FunctionType | None:
    """The Python function behind an attribute of a class: a method, property, static method or cached property."""
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    elif isinstance(attribute, property):
        attribute = attribute.fget
    elif isinstance(attribute, functools.cached_property):
        attribute = attribute.func
    # Anything else, such as a method bound to an object or a partial, is a value.
    return attribute if isinstance(attribute, types.FunctionType) else None
