"""Answers that lie where the graph writes them, and know when a later replay has overwritten them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.errors import StaleOutputError
from graphcache.graphs import native
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.operations import storage_of
from graphcache.graphs.single import Fire, Into
from graphcache.modules.conditions import raw_stream

_MOST_PLACES = 1_000


class Views:
    """Replays one graph into tensors that stay, so that a replay allocates nothing and points at nothing.

    Args:
        graph: The graph.
        name: Of the module, for messages.
    """

    # What the compiled short way reads and writes too stands at a fixed place.
    __slots__ = ("__dict__", "__weakref__", "replays", "shown", "stream")

    def __init__(self, graph: Graph, name: str) -> None:
        self._graph = graph
        self._places: set[int] = set()
        self._streams: set[int] = set()
        self.lock = native.new_lock()
        self.name = name
        self.shown: list[Tensor] | None = None
        """The tensors that the graph writes; ``None`` before the first replay."""
        self.stream = -1
        """The last stream that they are known to be used on."""
        self.replays = 0

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph; what earlier replays gave is overwritten.

        Returns:
            An :class:`OutputView` of each output.

        Raises:
            ClosedError: If the graph was closed.
        """
        with self.lock:
            # Before the launch: nobody may read what is about to change.
            self.replays += 1
            if self.shown is None:
                with torch.inference_mode(False), torch.no_grad():
                    self.shown = self._graph.replay(inputs)
                self._places = {storage_of(tensor) for tensor in self.shown}
            else:
                # A loop that feeds an answer back: a graph may read its inputs after it began to write.
                given = [each.clone() if storage_of(each) in self._places else each for each in inputs]
                self._graph.replay(given, self.shown)
            if isinstance(self._graph, CudaGraph):
                self._use_on(raw_stream(self._graph.index))
            return self.show(self.replays)

    def show(self, number: int) -> list[Tensor]:
        """A new :class:`OutputView` of each output, good until the replay after the one of this number."""
        return [_view(tensor, self, number) for tensor in self.shown or ()]

    def _use_on(self, stream: int) -> None:
        if stream not in self._streams:
            self._streams.add(stream)
            for tensor in self.shown or ():
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.stream = stream

    def fire(self, into: Into) -> Fire:
        """A shorter way to the same from one aligned input, on a stream where it was replayed before.

        It does nothing, and says ``None``, for what it leaves alone.

        Args:
            into: Replays the graph from a tensor into another.
        """

        def fire(x: Tensor, stream: int) -> Tensor | None:
            with self.lock:
                if self.shown is None or stream not in self._streams:
                    return None
                (out,) = self.shown
                # Before the launch, as above; what overlaps the answer is left alone, and nothing is launched.
                self.replays += 1
                if not into(x, out, stream):
                    self.replays -= 1
                    return None
                return _view(out, self, self.replays)

        return fire


class OutputView(Tensor):
    """A tensor that shows a graph's output until the next replay of that graph; whatever asks it later is refused.

    Views of it are such views themselves; what is computed from it is a tensor of its own. The next replay on another
    stream does not wait for readers on this one.
    """

    _source: Views
    _number: int

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was asked, if the view still shows what it was given out for.

        Raises:
            StaleOutputError: If it does not.
        """
        views = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, OutputView)]
        for view in views:
            _check(view)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            shown = {storage_of(view): view for view in views}
            return pytree.tree_map_only(Tensor, lambda tensor: _like(tensor, shown), result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What is stored belongs to no graph.
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).clone()


def is_plain(*values: Any) -> bool:
    """Whether there is no :class:`OutputView` in any of these, or in lists, tuples and dictionaries in them."""
    left: list[Any] = list(values)
    # Bounded: a structure may contain itself, or share its parts so often that nobody can visit each place.
    for _ in range(_MOST_PLACES):
        if not left:
            break
        value = left.pop()
        # Asked of the type: an object may lie about its class, or raise when it is asked.
        kind = type(value)
        if kind is OutputView:
            return False
        if issubclass(kind, (list, tuple)):
            left += value
        elif issubclass(kind, dict):
            left += value.values()
    return True


def plain(value: Any) -> Any:
    """The same arguments with every :class:`OutputView` as the tensor that it is.

    Raises:
        StaleOutputError: If one was overwritten.
    """
    return pytree.tree_map_only(OutputView, _plain, value)


def _plain(view: OutputView) -> Tensor:
    _check(view)
    return view.as_subclass(Tensor)


def _check(view: OutputView) -> None:
    later = view._source.replays - view._number
    if later:
        raise StaleOutputError(
            f"an output of {view._source.name} was used after {later} later replays of its graph, which wrote over it; "
            f"use it before the next call, .clone() it, or leave outputs='own'"
        )


def _view(tensor: Tensor, source: Views, number: int) -> Tensor:
    view = tensor.as_subclass(OutputView)
    view._source, view._number = source, number
    return view


def _like(tensor: Tensor, shown: dict[int, OutputView]) -> Tensor:
    view = shown.get(storage_of(tensor))
    if view is None or type(tensor) is not Tensor:
        return tensor
    return _view(tensor, view._source, view._number)
