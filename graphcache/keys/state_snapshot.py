"""Everything that a call can reach and change: a bounded walk, and what changed since.

The walk starts at a module and follows attributes, containers at any depth, ``__slots__``, closures, default values,
classes of the user's, and the globals that their methods and the functions called by them name. Of every container a
shallow copy is kept. The same snapshot tells the effects of a call (:meth:`StateSnapshot.changes`) and guards a graph
afterwards (:meth:`StateSnapshot.holds`).

Not seen are: state behind extension modules, files and sockets, names that are made up at run time, and memory that is
written past PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from graphcache import native
from graphcache.keys.state_nodes import Change, StateNode
from graphcache.keys.state_walk import Skips, StateWalk


class StateSnapshot:
    """The Python state and the tensors that can be reached from some objects.

    ``Unobservable`` is raised if there is more than can be watched, or an iterator whose position cannot be read.

    Args:
        roots: Objects, each with the name that paths begin with, such as ``("self", module)``.
        ignore: Paths that are left out; ``*`` stands for anything.
        skips: Tells objects that are not followed, such as modules that keep their own account.
        functions: Code whose globals are followed too, with these globals.

    Example:
        >>> state = {"calls": [0]}
        >>> snapshot = StateSnapshot([("state", state)])
        >>> state["calls"][0] += 1
        >>> snapshot.changes()[0].path
        "state['calls'][0]"
    """

    def __init__(
        self,
        roots: Sequence[tuple[str, object]],
        *,
        ignore: Sequence[str] = (),
        skips: Skips | None = None,
        functions: Mapping[CodeType, dict[str, Any]] | None = None,
    ) -> None:
        # Only * stands for anything: brackets are part of a path.
        self._ignore = re.compile("|".join(re.escape(each).replace(r"\*", ".*") + r"(?:[.[].*)?" for each in ignore))
        walk = StateWalk(self.ignores if ignore else None, skips)
        walk.walk(roots, functions or {})
        self.nodes, self.tensors, self.covered = walk.nodes, walk.tensors, walk.covered
        self.broken: Change | None = None
        """Why :meth:`holds` said that the snapshot is of the past."""
        self.armed = False
        """Whether :meth:`arm` was called."""
        self._native: tuple[native.Guard, list[StateNode]] | None = None
        """The native guard and the nodes that it does not compare; replaced as one, as other threads ask meanwhile."""

    def changes(self, limit: int = 16) -> list[Change]:
        """What differs now from what was found, by value; no more than ``limit`` differences are told."""
        found: list[Change] = []
        for node in (*self.nodes, *self.tensors):
            if node.differs():
                found += [change for change in node.changes(node.read()) if not self.ignores(change.path)]
            if len(found) >= limit:
                break
        return found[:limit]

    def written(self) -> list[Change]:
        """The tensors that operations wrote into since, or that gradients were accumulated for."""
        return [Change(node.path, "the tensor was written in place") for node in self.tensors if node.is_written]

    def holds(self) -> bool:
        """Whether everything is as it was found, for a graph: generators may have moved on, values of tensors changed.

        After :meth:`arm` it is a comparison in native code, as far as that is loaded. Once it says ``False`` it does so
        for good, and :attr:`broken` says why.
        """
        if self.broken is not None:
            return False
        if (compiled := self._native) is not None and compiled[0].holds():
            rest = compiled[1]
            return not any(node.differs() for node in rest) or self._compare(rest)
        return self._compare([node for node in self._guarded() if node.differs()])

    def renew(self) -> bool:
        """Whether it holds; if so, it tells the effects of what happens from now on."""
        if not self.holds():
            return False
        for node in (*self.tensors, *(node for node in self.nodes if not node.guarded)):
            node.renew()
        return True

    def arm(self) -> None:
        """Compare in native code from now on, if it is loaded."""
        self.armed = True
        kind = native.guard_type()
        if kind is None:
            return
        guard = kind()
        self._native = guard, [node for node in self._guarded() if not _is_guarded(node, guard)]

    @property
    def cuda_devices(self) -> set[int]:
        """Indices of the CUDA devices that its tensors are on."""
        return {node.target.device.index or 0 for node in self.tensors if node.target.is_cuda}

    def requires_grad(self) -> bool:
        """Whether any tensor wants gradients."""
        return any(node.target.requires_grad for node in self.tensors)

    def ignores(self, path: str) -> bool:
        """Whether a path, or one that it lies under, is to be left out."""
        return bool(self._ignore.pattern) and self._ignore.fullmatch(path) is not None

    def _guarded(self) -> Iterator[StateNode]:
        yield from (node for node in self.nodes if node.guarded)
        yield from self.tensors

    def _compare(self, nodes: Sequence[StateNode]) -> bool:
        """Whether objects that differ by identity have the same values; these objects are expected from now on."""
        for node in nodes:
            now = node.read()
            if change := next((each for each in node.changes(now) if not self.ignores(each.path)), None):
                self.broken = change
                return False
            # Not before: another thread that asks meanwhile has to find the difference too.
            node.state = now
        if self.armed:
            # With the objects of now, or because the native guard has been compiled meanwhile.
            self.arm()
        return True


def _is_guarded(node: StateNode, guard: native.Guard) -> bool:
    """Whether a native guard compares a node from now on."""
    try:
        node.guard(guard)
    except (TypeError, ValueError):
        # An object of a kind that it does not take, or that changed this moment.
        return False
    return True


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has memory that can be cloned and compared."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return False
    return bool(tensor.numel()) and not tensor.is_nested and not tensor._is_zerotensor()
