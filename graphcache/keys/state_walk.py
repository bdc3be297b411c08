"""A bounded walk over everything that can be reached from some objects, and what is remembered of each."""

from __future__ import annotations

import asyncio
import builtins
import collections
import concurrent.futures
import contextvars
import functools
import gc
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphcache.keys import state_nodes as nodes
from graphcache.keys import user_code
from graphcache.keys.state_nodes import StateNode
from graphcache.keys.value_nodes import ArrayNode, CacheNode, GradientFlagsNode, HiddenNode, TensorNode
from graphcache.keys.values import (
    BUILTIN_METHODS,
    MEMORY_FILES,
    MISSING,
    VIEWS,
    Unobservable,
    array_state,
    hidden_state,
    is_plain,
)

MAX_CONTAINERS = 50_000
"""A module of 1 000 submodules has about 25 000: nine tables each, most of them empty."""
MAX_ENTRIES = 2_000_000
MAX_SECONDS = 2.0
"""A walk over a BERT of 12 layers takes 0.015 s. The bound is for objects that make others as they are looked at."""
MAX_HOPS = 4
"""How far functions are followed that name one another; what runs beyond is found when it runs."""
MAX_ARRAY_BYTES = 1 << 20
"""Contents of NumPy arrays that are compared at every hit: about 50 us for a megabyte."""

_LOGGING = (logging.Logger, logging.Handler, logging.Filterer)
_MACHINERY = (concurrent.futures.Executor, concurrent.futures.Future, asyncio.AbstractEventLoop, threading.Thread)

_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_COMPARED = (functools._lru_cache_wrapper, *MEMORY_FILES)
"""Objects whose hidden state is part of a guard."""

_STANDS_FOR = {"module", "_graphcache_module"}
"""Where a wrapped module and an adopted engine have what they stand for."""

_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_TABLES = (dict, collections.OrderedDict, collections.defaultdict)
_BUILTINS = frozenset(dir(builtins))

Skips = Callable[[object], bool]


class StateWalk:
    """One walk over what can be reached."""

    def __init__(self, ignores: Callable[[str], bool] | None, skips: Skips | None) -> None:
        self.nodes: list[StateNode] = []
        """What was found, but for tensors."""
        self.tensors: list[TensorNode] = []
        self.covered: set[types.CodeType] = set()
        """The code of the functions whose globals were followed."""
        self._ignores = ignores
        self._skips = skips
        self._seen: set[int] = set()
        # What is looked at lives only here sometimes: an id may be used again once its object is gone.
        self._held: list[Any] = []
        self._stack: list[tuple[StateNode | None, str, Any]] = []
        self._entries = 0
        self._array_bytes = 0
        self._classes: set[type] = set()
        self._followed: set[type] = set()
        self._hops: dict[int, int] = {}
        self._used: dict[types.ModuleType, set[str]] = {}
        self._modules: dict[types.ModuleType, frozenset[str]] = {}
        """Modules of the user's that somebody holds or imports, with the names in them that were followed."""
        self._mentioned: set[str] = set()
        self._waiting: dict[str, list[tuple[str, types.FunctionType]]] = {}
        """Methods whose names no code that was followed mentions."""

    def walk(self, roots: Sequence[tuple[str, object]], functions: Mapping[types.CodeType, dict[str, Any]]) -> None:
        """Follow some objects, each with the name that its path begins with, and the globals of some code.

        Raises :class:`Unobservable` if that is too much, naming the largest part.
        """
        for code, table in functions.items():
            self._globals_of(code, table, 0)
        # Looked at first: what is reached in both ways has a path from a root.
        self._stack += [(None, name, value) for name, value in reversed(roots)]
        deadline = time.perf_counter() + MAX_SECONDS
        steps = 0
        while self._stack or self._named_in_modules():
            if not self._stack:
                continue
            parent, key, value = self._stack.pop()
            if is_plain(value) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._held.append(value)
            if self._ignores is not None and self._ignores(key if parent is None else parent.path + key):
                continue
            self._visit(parent, key, value)
            steps += 1
            slow = not steps % 1024 and time.perf_counter() > deadline
            if slow or len(self.nodes) > MAX_CONTAINERS or self._entries > MAX_ENTRIES:
                raise Unobservable(self._largest())
        for module, names in self._used.items():
            # What was named of libraries, which somebody may replace; it is not followed.
            self._add(nodes.NamesNode(None, module.__name__, vars(module), tuple(sorted(names))))
        if "requires_grad" in self._mentioned:
            self._add(GradientFlagsNode(None, "", tuple(self.tensors)))
        # Somebody may patch methods into the class of all tensors, which is not followed itself.
        methods = tuple(sorted(name for name in self._mentioned if hasattr(Tensor, name)))
        if methods:
            self._add(nodes.NamesNode(None, "Tensor", nodes.table_of(Tensor), methods))

    def _visit(self, parent: StateNode | None, key: str, value: Any) -> None:
        kind = type(value)
        if kind in weakref.ProxyTypes:
            with suppress(ReferenceError):
                # A method of the object that it stands for.
                self._push(parent, key, value.__reduce_ex__.__self__)
        elif issubclass(kind, Tensor):
            tensor = TensorNode(parent, key, value)
            self.tensors.append(tensor)
            if kind in _TENSORS:
                self._follow(nodes.AttributesNode(tensor, "", value.__dict__))
            else:
                self._attributes(parent, key, value)
        elif issubclass(kind, type):
            self._classes_of(value, follow=True)
        elif issubclass(kind, types.ModuleType):
            if not user_code.is_library(value.__name__):
                self._modules.setdefault(value, frozenset())
        elif issubclass(kind, (*_LOGGING, *_MACHINERY)):
            self._machinery(parent, key, value)
        elif kind in _TABLES:
            members = not key and isinstance(parent, nodes.AttributesNode)
            self._follow((nodes.AttributesNode if members else nodes.TableNode)(parent, key, value))
            if kind is collections.defaultdict:
                self._follow(nodes.ObjectNode(parent, key, value, nodes.slots_of(kind)))
        elif kind in _SEQUENCES:
            self._items(parent, key, value)
        elif kind is types.FunctionType:
            self._function(parent, key, value)
        elif kind is types.MethodType:
            self._push(parent, key, value.__func__)
            self._push(parent, f"{key}.__self__", value.__self__)
        elif kind is types.CellType:
            self._follow(nodes.CellNode(parent, key, value))
        elif kind in BUILTIN_METHODS:
            if not isinstance(value.__self__, types.ModuleType):
                self._push(parent, f"{key}.__self__", value.__self__)
        elif kind in VIEWS:
            self._push(parent, key, gc.get_referents(value)[0])
        elif issubclass(kind, weakref.ref):
            self._push(parent, f"{key}()", value())
        elif kind is contextvars.ContextVar:
            self._follow(nodes.VariableNode(parent, key, value))
        elif kind in (functools.partial, functools.partialmethod):
            self._attributes(parent, key, value)
        elif self._skips is not None and self._skips(value):
            # It keeps its own account; what it stands for may hold state all the same.
            self._add(nodes.ObjectNode(parent, key, value, {}))
            own = nodes.attributes_of(value) or {}
            for name in own.keys() & _STANDS_FOR:
                self._push(parent, key, own[name])
        else:
            self._object(parent, key, value)

    def _follow(self, node: StateNode) -> None:
        """Remember an object, and follow what is in its places."""
        names, values = node.state
        self._add(node)
        for name, item in zip(names, values, strict=True):
            if not is_plain(item) and item is not MISSING:
                self._stack.append((node, node.end(name), item))
            if not is_plain(name):
                self._stack.append((node, "[a key]", name))

    def _items(self, parent: StateNode | None, key: str, value: Any) -> None:
        if not isinstance(value, tuple):
            self._follow(nodes.ItemsNode(parent, key, value))
            return
        # A tuple cannot change; what it holds may.
        self._entries += len(value)
        for index, item in enumerate(tuple.__iter__(value)):
            self._push(parent, f"{key}[{index}]", item)

    def _function(self, parent: StateNode | None, key: str, value: types.FunctionType) -> None:
        code, module = value.__code__, value.__globals__.get("__name__")
        library = user_code.is_library(module)
        if not library or value.__dict__:
            self._follow(nodes.AttributesNode(parent, key, value.__dict__))
        if user_code.is_tracer(module):
            return
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            self._push(parent, f"{key}.{name}", cell)
        self._push(parent, f"{key}.__defaults__", value.__defaults__)
        self._push(parent, f"{key}.__kwdefaults__", value.__kwdefaults__)
        if library:
            return
        self._add(nodes.FunctionNode(parent, key, value))
        self._globals_of(code, value.__globals__, self._hops.get(id(value), 0))

    def _globals_of(self, code: types.CodeType, table: dict[str, Any], hops: int) -> None:
        """Follow the globals that a function of the user's names."""
        if code in self.covered or hops > MAX_HOPS:
            return
        self.covered.update(user_code.code_inside(code))
        names = user_code.global_names(code)
        self._mention(names.mentioned)
        self._names(table, names.loaded | names.stored, hops)
        if user_code.names_environment(names, table):
            self._push(None, "os.environ", vars(os.environ)["_data"])
        for module in user_code.imported_modules(names, table):
            self._push(None, module.__name__, module)
        for module, attribute in user_code.module_attributes(names, table):
            if user_code.is_library(module.__name__):
                self._used.setdefault(module, set()).add(attribute)
            else:
                self._names(vars(module), {attribute}, hops)

    def _named_in_modules(self) -> bool:
        """Follow names in modules of the user's; whether there were new ones."""
        found = False
        for module, known in tuple(self._modules.items()):
            names = (self._mentioned & vars(module).keys()) - known
            if names:
                found = True
                self._modules[module] = known | names
                self._names(vars(module), names, 1)
        return found

    def _names(self, table: dict[str, Any], names: set[str] | frozenset[str], hops: int) -> None:
        found = tuple(sorted(name for name in names if name in table or name not in _BUILTINS))
        if not found:
            return
        node = nodes.NamesNode(None, str(table.get("__name__", "globals")), table, found)
        self._add(node)
        for name, value in zip(*node.state, strict=True):
            if isinstance(value, types.FunctionType):
                self._hops.setdefault(id(value), hops + 1)
            if isinstance(value, type):
                self._classes_of(value, follow=False)
            elif value is not MISSING:
                self._push(node, node.end(name), value)

    def _object(self, parent: StateNode | None, key: str, value: Any) -> None:
        """An object of any class: its items if it is a container, its attributes, slots and hidden state."""
        kind = type(value)
        module = str(kind.__module__)
        if module.partition(".")[0] in ("concurrent", "multiprocessing", "logging", "tokenizers"):
            return
        if user_code.is_tracer(module) and not isinstance(value, nn.Module):
            return
        if issubclass(kind, threading.local):
            self._follow(nodes.ThreadLocalNode(parent, key, value))
            return
        if array_state(value) is not None:
            self._array(ArrayNode(parent, key, value))
            if getattr(getattr(value, "dtype", None), "hasobject", False):
                self._follow(nodes.ItemsNode(parent, key, value))
        elif issubclass(kind, dict):
            self._follow(nodes.TableNode(parent, key, value))
        elif issubclass(kind, _SEQUENCES):
            self._items(parent, key, value)
        elif issubclass(kind, torch.jit.ScriptModule):
            for name in value._c._method_names():
                # It becomes an attribute when it is first asked for.
                getattr(value, name, None)
            self._follow(nodes.ScriptNode(parent, key, value))
            for name, child in value.named_children():
                self._push(parent, f"{key}.{name}", child)
        if issubclass(kind, parametrize.ParametrizationList):
            # The weights that torch.nn.utils.parametrize.cached() keeps.
            self._names(vars(parametrize), {"_cache", "_cache_enabled"}, 1)
        self._attributes(parent, key, value)
        hidden = hidden_state(value)
        if hidden is not None:
            self._add((CacheNode if issubclass(kind, _COMPARED) else HiddenNode)(parent, key, value))
            for item in hidden[1]:
                self._push(parent, key, item)

    def _attributes(self, parent: StateNode | None, key: str, value: Any) -> None:
        kind = type(value)
        table, slots = nodes.attributes_of(value), nodes.slots_of(kind)
        if table is None and not slots:
            return
        self._seen.add(id(table))
        self._follow(nodes.ObjectNode(parent, key, value, slots))
        if table is not None:
            # Under the object's own path.
            self._follow(nodes.AttributesNode(parent, key, table))
        self._classes_of(kind, follow=True)

    def _machinery(self, parent: StateNode | None, key: str, value: Any) -> None:
        """A thread, executor or logger: of one of a user's class, the attributes that are not the library's own."""
        table = nodes.attributes_of(value)
        if table is None or user_code.is_library(type(value).__module__):
            return
        node = nodes.AttributesNode(parent, key, table)
        self._add(node)
        for name, item in table.items():
            if not name.startswith("_"):
                self._push(node, node.end(name), item)
        self._classes_of(type(value), follow=True)

    def _classes_of(self, kind: type, *, follow: bool) -> None:
        """A class, its bases and its metaclass."""
        metaclass: Any = type(kind)
        for each in (*kind.__mro__, *metaclass.__mro__):
            self._class(each, follow=follow)

    def _class(self, kind: type, *, follow: bool) -> None:
        """What a class of the user's defines, or a module of PyTorch's; ``follow`` for one whose methods may run."""
        library = user_code.is_library(kind.__module__)
        if library and not issubclass(kind, nn.Module):
            return
        if kind not in self._classes:
            self._classes.add(kind)
            self._add(nodes.ClassNode(None, kind.__qualname__, kind))
            if library and isinstance(forward := vars(kind).get("forward"), types.FunctionType):
                # Somebody may replace a function of torch.nn.functional.
                for module, name in user_code.module_attributes(
                    user_code.global_names(forward.__code__), forward.__globals__
                ):
                    self._used.setdefault(module, set()).add(name)
        if library or kind in self._followed:
            return
        if follow:
            self._followed.add(kind)
        for name, value in vars(kind).items():
            function = user_code.function_of(value)
            if follow and function is not None:
                self._method(f"{kind.__qualname__}.{name}", name, function)
            elif function is None and not name.startswith("__") and name != "_abc_impl":
                self._push(None, f"{kind.__qualname__}.{name}", value)

    def _method(self, path: str, name: str, function: types.FunctionType) -> None:
        """Follow a method once code that may run mentions its name."""
        if user_code.runs_by_itself(name) or name in self._mentioned:
            self._push(None, path, function)
        else:
            self._waiting.setdefault(name, []).append((path, function))

    def _mention(self, names: frozenset[str]) -> None:
        self._mentioned |= names
        for name in names & self._waiting.keys():
            for path, function in self._waiting.pop(name):
                self._push(None, path, function)

    def _array(self, node: ArrayNode) -> None:
        """Remember an array, if not too much of arrays is to be compared."""
        self._array_bytes += node.nbytes
        if self._array_bytes > MAX_ARRAY_BYTES:
            raise Unobservable(f"{node.path}: an array of {node.nbytes} bytes would be compared at every call")
        self._add(node)

    def _push(self, parent: StateNode | None, key: str, value: Any) -> None:
        if not is_plain(value):
            self._stack.append((parent, key, value))

    def _add(self, node: StateNode) -> None:
        self.nodes.append(node)
        self._entries += len(node.state[1])

    def _largest(self) -> str:
        """Which attribute has the most below it, and how much was found."""
        counts: collections.Counter[str] = collections.Counter()
        for node in self.nodes:
            top: StateNode = node
            while top.parent is not None and top.parent.parent is not None:
                top = top.parent
            counts[top.path] += 1
        ((path, count),) = counts.most_common(1)
        return f"{path}: {count} of the {len(self.nodes)} containers that were found before the walk was ended"
