"""Which code belongs to the user, and which globals a function names."""

from __future__ import annotations

import dis
import functools
import os
import sys
import types
from itertools import accumulate
from typing import Any, NamedTuple

LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "scipy", "triton", "sympy", "graphcache"}
    | {"typing_extensions"}
) - {"__main__"}
"""Top-level packages whose own globals and classes are not followed: they hold no state of a user's module."""

_NOT_CALLED = {
    *("__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__", "__repr__", "__str__", "__dir__"),
    *("__sizeof__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}
"""Special methods that a call of an object that exists does not come to by itself."""
_TRACERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.export", "torch._export")
_NO_STATE = (types.NoneType, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)


class Names(NamedTuple):
    """What a function names outside of itself, with the functions defined inside it."""

    mentioned: frozenset[str]
    """Every name in it, of attributes and methods too, and every constant that may be one, as for ``getattr``."""
    loaded: frozenset[str]
    """Globals that are read."""
    stored: frozenset[str]
    """Globals that are assigned or deleted."""
    of_modules: list[tuple[types.ModuleType, str]]
    """Attributes of modules, such as ``relu`` of ``torch.nn.functional``."""
    imported: list[types.ModuleType]
    """But for libraries."""
    environment: bool
    """Whether what reads the environment of the process is named."""


def is_library(module_name: Any) -> bool:
    """Whether code of a module is a library's, by the module's ``__name__``."""
    return not isinstance(module_name, str) or module_name.partition(".")[0] in LIBRARIES


def is_tracer(module_name: Any) -> bool:
    """Whether code or an object belongs to what traces and compiles modules, whose own state is no state of theirs."""
    return isinstance(module_name, str) and module_name.startswith(_TRACERS)


def runs_by_itself(name: str) -> bool:
    """Whether a method may run in a call though no code mentions its name."""
    return name == "forward" or (name.startswith("__") and name.endswith("__") and name not in _NOT_CALLED)


def names_of(code: types.CodeType, table: dict[str, Any]) -> Names:
    """What a function with these globals names."""
    mentioned, loaded, stored, chains, paths = _named_in(code)
    of_modules = []
    for first, *rest in chains:
        value = table.get(first)
        for attribute in rest:
            if not isinstance(value, types.ModuleType):
                break
            of_modules.append((value, attribute))
            value = vars(value).get(attribute)
    # How many levels up an import begins is not looked at.
    prefixes = ["", *accumulate(str(table.get("__package__") or "").split("."), "{}.{}".format)]
    absolute = [f"{prefix}.{path}".strip(".") for path in paths for prefix in prefixes]
    found = [sys.modules.get(path) for path in absolute if not is_library(path)]
    imported = [module for module in found if isinstance(module, types.ModuleType)]
    named = any(value is os.environ or value is os.getenv for value in map(table.get, loaded))
    environment = named or not mentioned.isdisjoint(("environ", "getenv"))
    return Names(mentioned, loaded, stored, of_modules, imported, environment)


def has_global_state(code: types.CodeType, table: dict[str, Any]) -> bool:
    """Whether a function names a global that may hold a state: anything but functions, classes and libraries."""
    names = names_of(code, table)
    if names.stored or names.imported or names.environment:
        return True
    values = [table.get(name) for name in names.loaded]
    values += [vars(module).get(name) for module, name in names.of_modules if not is_library(module.__name__)]
    return any(not issubclass(type(value), _NO_STATE) for value in values)


@functools.lru_cache(maxsize=4096)
def _named_in(code: types.CodeType) -> tuple[frozenset[Any], ...]:
    """All names, globals read and set, attributes taken at once from those read, and paths of imports."""
    mentioned, loaded, stored, chains, paths = (set[Any]() for _ in range(5))
    for each in code_inside(code):
        mentioned.update(each.co_names)
        mentioned.update(value for value in each.co_consts if type(value) is str and value.isidentifier())
        chain: tuple[str, ...] = ()
        for instruction in dis.get_instructions(each):
            name, value = instruction.opname, instruction.argval
            before, chain = chain, ()
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = (value,)
                loaded.add(value)
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and before:
                chain = (*before, value)
                chains.add(chain)
            elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                stored.add(value)
            elif name == "IMPORT_NAME":
                paths.add(value)
    return tuple(map(frozenset, (mentioned, loaded, stored, chains, paths)))


def code_inside(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those of the functions defined inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(each for constant in inner for each in code_inside(constant))]


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
