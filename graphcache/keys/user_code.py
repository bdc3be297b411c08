"""Which code belongs to the user, and which globals a function names."""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import types
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

from graphcache.keys.values import is_plain

LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "scipy", "triton", "sympy", "graphcache"}
    | {"typing_extensions"}
) - {"__main__", "types"}
"""Top-level packages whose own globals and classes are not followed: they hold no state of a user's module. What a user
makes at run time may say that it belongs to ``types``, or to no module."""

# Nothing where Python is frozen into a program.
_STANDARD = os.path.dirname(getattr(os, "__file__", ""))

_NOT_CALLED = {
    *("__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__", "__repr__", "__str__", "__dir__"),
    *("__sizeof__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}
"""Special methods that a call of an object that exists does not come to by itself; if one runs, it is followed then."""
_TRACERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.export", "torch._export")
_NO_STATE = (types.NoneType, types.ModuleType, types.BuiltinFunctionType)


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
    """Modules that it imports, or has the name of, but for libraries."""
    environment: bool
    """Whether what reads the environment of the process is named."""


def is_library(module_name: Any) -> bool:
    """Whether code of a module is a library's, by the module's ``__name__``."""
    if not isinstance(module_name, str):
        return False
    package = module_name.partition(".")[0]
    return package in LIBRARIES and not _is_shadowed(package, sys.modules.get(package))


@functools.cache
def _is_shadowed(package: str, module: types.ModuleType | None) -> bool:
    """Whether what has the name of a module of the standard library, such as ``code``, is a package of the user's."""
    found = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if package not in sys.stdlib_module_names or found is None:
        return False
    return not found.startswith(_STANDARD) or any(each in found for each in ("site-packages", "dist-packages"))


def helpers_of(module: types.ModuleType, name: str) -> frozenset[str]:
    """The names in a module that a function of it uses."""
    function, table = vars(module).get(name), vars(module)
    if type(function) is not types.FunctionType or function.__globals__ is not table:
        return frozenset()
    return names_of(function.__code__, table).loaded & table.keys()


def is_tracer(module_name: Any) -> bool:
    """Whether code or an object belongs to what traces and compiles modules, whose own state is no state of theirs."""
    return isinstance(module_name, str) and module_name.startswith(_TRACERS)


def runs_by_itself(name: str) -> bool:
    """Whether a method may run in a call though no code mentions its name."""
    return name == "forward" or (name.startswith("__") and name.endswith("__") and name not in _NOT_CALLED)


def names_of(code: types.CodeType, table: dict[str, Any]) -> Names:
    """What a function with these globals names."""
    mentioned, loaded, stored, chains, paths, texts = _named_in(code)
    if "globals" in loaded:
        loaded |= texts & table.keys()
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
    if not mentioned.isdisjoint(("import_module", "__import__", "modules")):
        absolute += texts & sys.modules.keys()
    found = [sys.modules.get(path) for path in absolute if not is_library(path)]
    imported = [module for module in found if isinstance(module, types.ModuleType)]
    named = any(value is os.environ or value is os.getenv for value in map(table.get, loaded))
    environment = named or not mentioned.isdisjoint(("environ", "getenv"))
    return Names(mentioned, loaded, stored, of_modules, imported, environment)


def has_global_state(code: types.CodeType, table: dict[str, Any]) -> bool:
    """Whether a function names a global that may hold a state or be replaced: anything but what libraries define."""
    names = names_of(code, table)
    if names.stored or names.imported or names.environment:
        return True
    values = [table.get(name) for name in names.loaded]
    values += [vars(module).get(name) for module, name in names.of_modules if not is_library(module.__name__)]
    return any(not issubclass(type(value), _NO_STATE) and not _is_of_library(value) for value in values)


def _is_of_library(value: Any) -> bool:
    """Whether a value is a function or a class that a library defines."""
    return isinstance(value, (types.FunctionType, type)) and is_library(value.__module__)


def world_of_distributed() -> Any:
    """What knows whether ``torch.distributed`` is initialised, if that is imported and has it."""
    return getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)


def holds_state(function: types.FunctionType) -> bool:
    """Whether a function has a closure, attributes, or default values that may change."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return bool(function.__closure__ or function.__dict__) or not all(map(is_plain, defaults))


def functions_of(codes: Iterable[types.CodeType]) -> list[types.FunctionType]:
    """The functions that exist with some code."""
    wanted = set(codes)
    found = [each for each in gc.get_referrers(*wanted) if isinstance(each, types.FunctionType)]
    return [each for each in found if each.__code__ in wanted]


@functools.lru_cache(maxsize=4096)
def _named_in(code: types.CodeType) -> tuple[frozenset[Any], ...]:
    """All names, globals read and set, attributes taken at once from those read, paths of imports, and texts."""
    mentioned, loaded, stored, chains, paths, texts = (set[Any]() for _ in range(6))
    for each in code_inside(code):
        mentioned.update(each.co_names)
        texts.update(value for value in each.co_consts if type(value) is str)
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
    mentioned.update(filter(str.isidentifier, texts))
    return tuple(map(frozenset, (mentioned, loaded, stored, chains, paths, texts)))


def code_inside(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those of the functions defined inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(each for constant in inner for each in code_inside(constant))]


def parts_of(attribute: Any) -> list[Any]:
    """What is behind an attribute of a class: the functions of a method or a property, or the value itself."""
    if isinstance(attribute, (staticmethod, classmethod)):
        return [attribute.__func__]
    if isinstance(attribute, property):
        return [each for each in (attribute.fget, attribute.fset, attribute.fdel) if each is not None]
    return [attribute.func] if isinstance(attribute, functools.cached_property) else [attribute]
