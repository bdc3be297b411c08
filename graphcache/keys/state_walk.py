"""A bounded walk over everything that can be reached from some objects, and what is remembered of each."""

from __future__ import annotations

import builtins
import collections
import contextvars
import ctypes
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphcache.keys import state_nodes as nodes
from graphcache.keys import user_code
from graphcache.keys.attributes import attributes_of, behind, items_of, slots_of, table_of
from graphcache.keys.machinery import is_machinery, levels_of, names_of_libraries
from graphcache.keys.state_nodes import StateNode, TensorNode
from graphcache.keys.user_code import is_library
from graphcache.keys.value_nodes import (
    ArrayNode,
    GradientNode,
    HeldNode,
    HiddenNode,
    ShownNode,
    VariableNode,
    array_state,
    hidden_state,
    script_state,
)
from graphcache.keys.values import MISSING, Unobservable, is_plain

MAX_CONTAINERS = 50_000
"""A module of 1 000 submodules has about 25 000: nine tables each, most of them empty."""
MAX_ENTRIES = 2_000_000
MAX_SECONDS = 2.0
"""A walk over a BERT of 12 layers takes 0.015 s. The bound is for objects that make others as they are looked at."""
MAX_HOPS = 4
"""How far functions are followed that name one another; what runs beyond is found when it runs."""
MAX_ARRAY_BYTES = 1 << 20
"""Contents of NumPy arrays that are compared at every hit: about 50 us for a megabyte."""

_OF_C = ctypes._SimpleCData.__mro__[1]
_OF_PYTHON = frozenset({"typing", "importlib.machinery", "_frozen_importlib", "_frozen_importlib_external"})
"""Where hints of types and what modules were made by come from, which hold no state of anybody's."""
_PLAIN = {dict, collections.OrderedDict, *nodes.ITEMS}
"""Containers without attributes."""
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_STANDS_FOR = {"module", "_graphcache_module"}
"""Where a wrapped module and an adopted engine have what they stand for."""
_BUILTINS = frozenset(dir(builtins))

Skips = Callable[[object], bool]


class StateWalk:
    """One walk over what can be reached."""

    def __init__(
        self,
        ignores: Callable[[str], bool] | None,
        skips: Skips | None,
        weakly: Sequence[object] = (),
        mentioned: Iterable[str] = (),
        left_out: Mapping[int, tuple[Any, ...]] = types.MappingProxyType({}),
    ) -> None:
        self.nodes: list[StateNode] = []
        """What was found, but for tensors."""
        self.tensors: list[TensorNode] = []
        self.covered: set[types.CodeType] = set()
        """The code of the functions whose globals were followed."""
        self._ignores = ignores
        self._skips = skips
        self._weakly = set(map(id, weakly))
        self._left_out = left_out
        """Keys of dictionaries and indices of lists, by the identity of these."""
        self._seen: set[int] = set()
        # An id may be used again once its object is gone, which may live only here.
        self._held: list[Any] = []
        self._stack: list[tuple[StateNode | None, str, Any]] = []
        self._entries = 0
        self._array_bytes = 0
        self._classes: set[type] = set()
        """Classes that were looked at."""
        self._hops: dict[int, int] = {}
        self._used: dict[types.ModuleType, set[str]] = {}
        """Names of libraries, which somebody may replace; they are not followed."""
        self._modules: dict[types.ModuleType, frozenset[str]] = {}
        """Modules of the user's that somebody holds or imports, with the names in them that were followed."""
        self.mentioned = set(mentioned)
        """Names of attributes in code that may run."""
        self._named: dict[int, nodes.NamesNode] = {}
        """The nodes of dictionaries of which some names are looked at, by the identity of these."""
        self._waiting: dict[str, list[tuple[str, Any]]] = {}
        """Methods, and data with special names, whose names no code that was followed mentions."""

    def walk(self, roots: Sequence[tuple[str, object]], functions: Mapping[types.CodeType, dict[str, Any]]) -> None:
        """Follow some objects, each with the name that its path begins with, and the globals of some code.

        :class:`Unobservable` names the largest part, if that is too much.
        """
        for code, table in functions.items():
            # Of what these call, whatever has run is here too.
            self._globals_of(code, table, MAX_HOPS)
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
            self._some(module.__name__, vars(module), sorted(names))
        for name in ("requires_grad", "grad"):
            if name in self.mentioned:
                self._add(GradientNode({node.path: node.target for node in self.tensors}, name))
        # Somebody may patch methods into the class of all tensors, which is not followed itself.
        methods = tuple(sorted(name for name in self.mentioned if hasattr(Tensor, name)))
        if methods:
            self._some("Tensor", table_of(Tensor), methods)

    def _visit(self, parent: StateNode | None, key: str, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN or kind is collections.defaultdict:
            self._object(parent, key, value)
        elif (parts := behind(value)) is not None:
            self._entries += len(parts)
            self._stack += [(parent, key + end, item) for end, item in parts]
            if issubclass(kind, weakref.ref) and kind is not weakref.ref:
                self._attributes(parent, key, value)
        elif issubclass(kind, Tensor):
            tensor = TensorNode(parent, key, value)
            self.tensors.append(tensor)
            if kind in _TENSORS:
                self._follow(nodes.AttributesNode(tensor, "", value.__dict__))
            else:
                self._attributes(parent, key, value)
        elif issubclass(kind, type):
            self._classes_of(value)
        elif issubclass(kind, types.ModuleType):
            if not is_library(value.__name__):
                self._modules.setdefault(value, frozenset())
        elif kind is types.FunctionType:
            self._function(parent, key, value)
        elif kind.__module__ in _OF_PYTHON:
            pass
        elif kind is types.CellType:
            self._follow(nodes.CellNode(parent, key, value))
        elif kind is contextvars.ContextVar:
            self._follow(VariableNode(parent, key, value))
        elif issubclass(kind, threading.local):
            self._follow(ShownNode(parent, key, value, _of_this_thread))
            self._classes_of(kind)
        elif is_machinery(kind):
            self._machinery(parent, key, value)
        elif self._skips is not None and self._skips(value):
            # It keeps its own account; what it stands for may hold state all the same.
            self._add(nodes.ObjectNode(parent, key, value, {}))
            own = attributes_of(value) or {}
            self._stack += [(parent, key, own[name]) for name in own.keys() & _STANDS_FOR]
        elif issubclass(kind, nn.Module) or not user_code.is_tracer(kind.__module__):
            self._object(parent, key, value)

    def _follow(self, node: StateNode) -> None:
        """Remember an object, and follow what is in its places."""
        if self._ignores is not None and isinstance(node, nodes.TableNode):
            # A native guard would find them changed at every call, and have all of Python's comparisons done.
            ignored = [name for name in node.state[0] if self._ignores(node.path + node.end(name))]
            node.places = (*node.places, *ignored)
            node.state = node.read()
        self._add(node)
        for name, item in zip(*node.state, strict=True):
            if not is_plain(item):
                self._stack.append((node, node.end(name), item))
            if not is_plain(name):
                self._stack.append((node, "[a key]", name))

    def _add(self, node: StateNode) -> None:
        self.nodes.append(node)
        self._entries += len(node.state[1])

    def _object(self, parent: StateNode | None, key: str, value: Any) -> None:
        """An object of any class: its items if it is a container, its attributes, slots and hidden state."""
        kind = type(value)
        if issubclass(kind, dict):
            members = not key and isinstance(parent, nodes.AttributesNode)
            kind_of_node = nodes.AttributesNode if members else nodes.TableNode
            self._follow(kind_of_node(parent, key, value, self._left_out.get(id(value), ())))
        elif issubclass(kind, nodes.ITEMS):
            self._follow(nodes.ItemsNode(parent, key, value, self._left_out.get(id(value), ())))
        elif issubclass(kind, tuple):
            self._stack += [(parent, key + end, item) for end, item in items_of(value)]
        elif array_state(value) is not None:
            self._array(ArrayNode(parent, key, value))
            if issubclass(kind, _OF_C):
                # What a pointer points at.
                self._stack.append((parent, key, value._objects))
        elif issubclass(kind, torch.jit.ScriptModule):
            for name in value._c._method_names():
                # It becomes an attribute when it is first asked for.
                getattr(value, name, None)
            self._follow(ShownNode(parent, key, value, script_state))
            self._stack += [(parent, f"{key}.{name}", child) for name, child in value.named_children()]
        elif issubclass(kind, torch.optim.Optimizer):
            # It does nothing for parameters without gradients.
            self.mentioned.add("grad")
        elif issubclass(kind, parametrize.ParametrizationList):
            # The weights that torch.nn.utils.parametrize.cached() keeps.
            self._names(vars(parametrize), {"_cache", "_cache_enabled"}, 1)
        elif hidden_state(value) is not None:
            node = HiddenNode(parent, key, value)
            self._add(node)
            self._stack += [(parent, key, item) for item in node.state[1][1]]
        if kind not in _PLAIN:
            self._attributes(parent, key, value)

    def _array(self, node: StateNode) -> None:
        """Remember an array, if not too much of arrays is to be compared, and the objects in it."""
        nbytes = len(node.state[1][-1])
        self._array_bytes += nbytes
        if self._array_bytes > MAX_ARRAY_BYTES:
            raise Unobservable(f"{node.path}: an array of {nbytes} bytes would be compared at every call")
        self._add(node)
        if getattr(getattr(node.target, "dtype", None), "hasobject", False):
            self._follow(nodes.ItemsNode(node.parent, node.key, node.target))

    def _attributes(self, parent: StateNode | None, key: str, value: Any) -> None:
        kind = type(value)
        table, slots = attributes_of(value), slots_of(kind)
        if table is None and not slots:
            return
        self._seen.add(id(table))
        kind_of_node = HeldNode if id(value) in self._weakly else nodes.ObjectNode
        self._follow(kind_of_node(parent, key, value, slots))
        if table is not None:
            # Under the object's own path.
            kind_of_dict = nodes.AttributesNode if type(table) is dict else nodes.DictOfNode
            self._follow(kind_of_dict(parent, key, table, self._left_out.get(id(table), ())))
        self._classes_of(kind)

    def _machinery(self, parent: StateNode | None, key: str, value: Any) -> None:
        """A thread, executor or logger: of one of a user's class, the attributes that are not the library's own."""
        table = attributes_of(value)
        kind: Any = type(value)
        if issubclass(kind, logging.LoggerAdapter):
            self._stack.append((parent, f"{key}.logger", value.logger))
        for path, names, own in levels_of(value) if issubclass(kind, logging.Logger) else ():
            self._some(path, names, own)
        if table is not None and not is_library(kind.__module__):
            self._follow(nodes.AttributesNode(parent, key, table, names_of_libraries(kind)))
            self._classes_of(kind)

    def _function(self, parent: StateNode | None, key: str, value: types.FunctionType) -> None:
        code, module = value.__code__, value.__globals__.get("__name__")
        library = is_library(module)
        if not library or value.__dict__:
            self._follow(nodes.AttributesNode(parent, key, value.__dict__))
        if user_code.is_tracer(module):
            return
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        self._stack += [(parent, f"{key}.{name}", cell) for name, cell in cells]
        for name in ("__defaults__", "__kwdefaults__"):
            self._stack.append((parent, f"{key}.{name}", getattr(value, name)))
        if not library:
            self._add(nodes.FunctionNode(parent, key, value))
            self._globals_of(code, value.__globals__, self._hops.get(id(value), 0))

    def _globals_of(self, code: types.CodeType, table: dict[str, Any], hops: int) -> None:
        """Follow the globals that a function of the user's names."""
        if code in self.covered or hops > MAX_HOPS:
            return
        self.covered.update(user_code.code_inside(code))
        names = user_code.names_of(code, table)
        self.mentioned |= names.mentioned
        for name in names.mentioned & self._waiting.keys():
            self._stack += [(None, *method) for method in self._waiting.pop(name)]
        self._names(table, names.loaded | names.stored, hops)
        if names.environment:
            self._stack.append((None, "os.environ", vars(os.environ)["_data"]))
        self._stack += [(None, module.__name__, module) for module in names.imported]
        for module, name in names.of_modules:
            if is_library(module.__name__):
                self._used.setdefault(module, set()).add(name)
                if module.__name__ == "torch.distributed" and (world := user_code.world_of_distributed()) is not None:
                    self._some(module.__name__, vars(world), ("_default_pg",))
                # Such as sys.argv; and what logging.debug() asks.
                value = logging.root if module is logging else vars(module).get(name)
                if type(value) in (list, logging.RootLogger):
                    self._stack.append((None, f"{module.__name__}.{name}", value))
            else:
                self._names(vars(module), {name}, hops)

    def _named_in_modules(self) -> bool:
        """Follow names in modules of the user's; whether there were new ones."""
        found = False
        for module, known in tuple(self._modules.items()):
            if names := (self.mentioned & vars(module).keys()) - known:
                found = True
                self._modules[module] = known | names
                self._names(vars(module), names, 1)
        return found

    def _names(self, table: dict[str, Any], names: set[str] | frozenset[str], hops: int) -> None:
        found = tuple(sorted(name for name in names if name in table or name not in _BUILTINS))
        if not found:
            return
        new = tuple(name for name in found if name in vars(builtins) and name not in table)
        if new and table is not vars(builtins):
            # Somebody has put them there.
            self._names(vars(builtins), set(new), hops)
        node, unknown = self._some(str(table.get("__name__", "globals")), table, found)
        for name in unknown:
            value = table.get(name, MISSING)
            if isinstance(value, types.FunctionType):
                self._hops.setdefault(id(value), hops + 1)
            self._stack.append((node, node.end(name), value))

    def _some(self, path: str, table: dict[str, Any], names: Iterable[str]) -> tuple[nodes.NamesNode, list[str]]:
        """Remember names in a dictionary, in the one node that it has; which of them are new."""
        if (node := self._named.get(id(table))) is None:
            node = self._named[id(table)] = nodes.NamesNode(None, path, table, ())
            self._add(node)
        new = [name for name in names if name not in node.places]
        node.places = (*node.places, *new)
        node.state = node.read()
        self._entries += len(new)
        return node, new

    def _classes_of(self, kind: type) -> None:
        """What a class of the user's, or a module of PyTorch's, its bases and its metaclass define.

        A method, or data with a special name, is followed once code that may run mentions its name.
        """
        metaclass: Any = type(kind)
        for each in (*kind.__mro__, *metaclass.__mro__):
            library = is_library(each.__module__)
            if each in self._classes or (library and not issubclass(each, nn.Module)):
                continue
            self._classes.add(each)
            self._add(nodes.ClassNode(None, each.__qualname__, each))
            if library:
                if isinstance(forward := vars(each).get("forward"), types.FunctionType):
                    # Somebody may replace a function of torch.nn.functional.
                    for module, name in user_code.names_of(forward.__code__, forward.__globals__).of_modules:
                        self._used.setdefault(module, set()).update((name, *user_code.helpers_of(module, name)))
                continue
            for name, value in vars(each).items():
                path = f"{each.__qualname__}.{name}"
                for part in user_code.parts_of(value):
                    is_data = not isinstance(part, types.FunctionType)
                    runs = not name.startswith("__") if is_data else user_code.runs_by_itself(name)
                    if (runs or name in self.mentioned) and name != "_abc_impl":
                        self._stack.append((None, path, part))
                    elif not is_plain(part):
                        self._waiting.setdefault(name, []).append((path, part))

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


def _of_this_thread(local: threading.local) -> dict[str, Any]:
    return {f".{name}": value for name, value in local.__dict__.items()}
