"""Everything that a call can reach and change: a bounded walk, and what changed since.

The walk starts at a module and follows attributes, containers at any depth, ``__slots__``, closures, default values,
classes of the user's, and the globals that their methods and the functions called by them name. The same snapshot tells
the effects of a call (:meth:`StateSnapshot.changes`) and guards a graph afterwards (:meth:`StateSnapshot.holds`).

Not seen are: state behind extension modules, names that are made up at run time, and memory that is written past
PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcache import native
from graphcache.keys.state_nodes import Change, ItemsNode, State, StateNode, TableNode
from graphcache.keys.state_walk import Skips, StateWalk
from graphcache.keys.values import MISSING


class StatePlace(NamedTuple):
    """An entry of a dictionary, such as that of an object's attributes, or of a list."""

    table: Any
    name: Any
    path: str

    @property
    def value(self) -> Any:
        """What it holds now; ``MISSING`` if it is not there."""
        if type(self.table) is list:
            return self.table[self.name] if self.name < len(self.table) else MISSING
        return self.table.get(self.name, MISSING)

    def put(self, value: Any) -> None:
        """Let it hold a value, or nothing if that is ``MISSING``."""
        if type(self.table) is list:
            # It may have become shorter.
            self.table[self.name : self.name + 1] = [value] if self.name < len(self.table) else []
        elif value is not MISSING:
            self.table[self.name] = value
        else:
            self.table.pop(self.name, None)


class StateSnapshot:
    """The Python state and the tensors that can be reached from ``roots``, each with the name its paths begin with.

    Left out are paths in ``ignore``, where ``*`` stands for anything, and what is below objects that ``skips`` tells.
    Of code in ``functions`` the globals are followed too, and of classes the methods that are ``mentioned`` elsewhere.
    Objects in ``weakly`` are not kept alive, and what stands at ``places`` is no part of the state.
    :class:`Unobservable` says that there is too much of it.
    """

    __slots__ = (
        *("_broken", "_guarded", "_ignore", "_native", "_places"),
        *("armed", "compared", "covered", "mentioned", "nodes", "tensors", "version"),
    )

    def __init__(
        self,
        roots: Sequence[tuple[str, object]],
        *,
        ignore: Sequence[str] = (),
        skips: Skips | None = None,
        functions: Mapping[CodeType, dict[str, Any]] | None = None,
        weakly: Sequence[object] = (),
        mentioned: Iterable[str] = (),
        places: Sequence[StatePlace] = (),
    ) -> None:
        # Only * stands for anything: brackets are part of a path.
        self._ignore = re.compile("|".join(re.escape(each).replace(r"\*", ".*") + r"(?:[.[].*)?" for each in ignore))
        self._places = places
        left_out: dict[int, tuple[Any, ...]] = {}
        for place in places:
            left_out[id(place.table)] = (*left_out.get(id(place.table), ()), place.name)
        walk = StateWalk(self.ignores if ignore else None, skips, weakly, mentioned, left_out)
        walk.walk(roots, functions or {})
        self.nodes, self.tensors, self.covered = walk.nodes, walk.tensors, walk.covered
        self.mentioned = walk.mentioned
        """Names of attributes in code that may run, by which methods were followed."""
        self._guarded: list[StateNode] = [*(node for node in walk.nodes if node.guarded), *walk.tensors]
        self._broken = False
        self.armed = False
        self.version = 0
        """That of the guard whose snapshot it is."""
        self._native: tuple[Any, list[StateNode]] = (None, self._guarded)
        """The native guard and the nodes that it does not compare; replaced as one, as other threads ask meanwhile."""
        self.compared: Any = None
        """The native guard if it compares every node, for native code, which need not ask here while it holds."""

    def guard_also(self, node: StateNode) -> None:
        """Compare one more node, which is no part of the effects of a call."""
        self._guarded.append(node)

    def changes(self, limit: int = 16) -> list[Change]:
        """What differs now from what was found, by value; no more than ``limit`` differences are told."""
        differing = (node for node in (*self.nodes, *self.tensors) if node.differs())
        return list(islice(chain.from_iterable(map(self._changes_of, differing)), limit))

    def rebound(self) -> list[StatePlace]:
        """Where other tensors of the same kind are than before, and what is left out; nothing if more differs."""
        found = list[StatePlace]()
        for node in (*self.nodes, *self.tensors):
            if not node.differs() or not self._changes_of(node, now := node.read()):
                continue
            before, after = (dict(zip(*state, strict=True)) for state in (node.state, now))
            names = [name for name in {**before, **after} if before.get(name) is not after.get(name)]
            names = [name for name in names if not self.ignores(node.path + node.end(name))]
            alike = isinstance(node, (TableNode, ItemsNode)) and type(node.target) in (dict, list)
            alike = alike and all(type(name) in (str, int) for name in names)
            if not alike or not all(is_alike(before.get(name), after.get(name)) for name in names):
                return []
            found += [StatePlace(node.target, name, node.path + node.end(name)) for name in names]
        reached = {id(node.target) for node in self.nodes}
        return [*found, *(place for place in self._places if id(place.table) in reached)] if found else []

    def put_back(self, places: Sequence[StatePlace]) -> None:
        """Let places hold again what they held when this was found."""
        held = {id(node.target): dict(zip(*node.state, strict=True)) for node in self.nodes}
        for place in places:
            place.put(held[id(place.table)].get(place.name, MISSING))

    def written(self) -> list[Change]:
        """The tensors that operations wrote into since, or that gradients were accumulated for."""
        return [Change(node.path, "the tensor was written in place") for node in self.tensors if node.is_written]

    def holds(self) -> bool:
        """Whether everything is as it was found, for a graph: generators may have moved on, values of tensors changed.

        After :meth:`arm` it is a comparison in native code, as far as that is loaded. Once it says ``False`` it does so
        for good.
        """
        if self._broken:
            return False
        compiled, rest = self._native
        unchanged = compiled is not None and compiled.holds()
        differing = [node for node in (rest if unchanged else self._guarded) if node.differs()]
        for node in differing:
            now = node.read()
            if self._changes_of(node, now):
                self._broken, self.compared = True, None
                return False
            # Not before: another thread that asks meanwhile has to find the difference too.
            node.state = now
        if self.armed and (differing or not unchanged):
            # With the objects of now, or because the native guard has been compiled meanwhile.
            self.arm()
        return True

    def renew(self) -> bool:
        """Whether it holds; if so, it tells the effects of what happens from now on."""
        if not self.holds():
            return False
        nodes = (*self.tensors, *(node for node in self.nodes if not node.guarded))
        return all(node.renew() for node in nodes)

    def arm(self) -> None:
        """Compare in native code from now on, if it is loaded."""
        self.armed = True
        if (kind := native.guard_type()) is not None:
            guard = kind()
            self._native = guard, [node for node in self._guarded if not _is_guarded(node, guard)]
            self.compared = guard if self._native[1] == [] and not self._broken else None

    def ignores(self, path: str) -> bool:
        """Whether a path, or one that it lies under, is to be left out."""
        return bool(self._ignore.pattern) and self._ignore.fullmatch(path) is not None

    def _changes_of(self, node: StateNode, now: State | None = None) -> list[Change]:
        changes = node.changes(now or node.read())
        return [each for each in changes if not (node.is_ignorable and self.ignores(each.path))]


def _is_guarded(node: StateNode, guard: Any) -> bool:
    """Have a native guard compare a node; whether it does."""
    try:
        node.guard(guard)
    except (TypeError, ValueError):
        # An object of a kind that it does not take, or that changed this moment.
        return False
    return True


def is_alike(old: Any, new: Any) -> bool:
    """Whether both are tensors of the same dtype, shape and device, or tuples or lists of such."""
    if type(old) in (tuple, list) and type(old) is type(new):
        return len(old) == len(new) > 0 and all(map(is_alike, old, new))
    if type(old) is not Tensor or type(new) is not Tensor:
        return False
    return not new.requires_grad and _kind(old) == _kind(new)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device, tensor.layout


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has memory that can be cloned and compared."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return False
    if not tensor.numel() or tensor.is_nested or tensor._is_zerotensor():
        return False
    # Its memory may have been resized, and what lies behind it is not to be read.
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()
