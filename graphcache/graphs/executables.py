"""Executables of one captured graph, each pointed at tensors of its own: tensors that come again need no patch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.io_slots import IoSlot
from graphcache.graphs.stream_order import StreamOrder

MOST = 8
"""Executables of a small graph. A loop that makes an input and drops an answer goes through three or four pairs of
addresses of torch's allocator, a ring of buffers through more."""

SMALL = 32
"""The largest graph, in nodes, that has more than one. A patch delayed the next launch by 0.7 µs (H200) and 3.5 µs
(H100), a change of executables by 0.3 µs with 3 nodes but by 10 µs with 106 (driver 580)."""

EXECUTABLE_BYTES = 96 * 1024
"""Device memory of an executable besides its nodes, an estimate: 80 to 128 KiB were seen with 3 nodes, 192 to 256 with
106 (H100, driver 580)."""

NODE_BYTES = 2 * 1024
"""What each node adds."""

GROWS_AFTER = 32
"""Patches, in launches that follow a launch of the same graph, before there is one more executable; a patch after
another graph's launch counts against it. With 32 graphs of 3 nodes in turn, eight executables each took 4.5 µs longer
than the bare launch and one each 1.1; with one graph it was 0.7 and 1.5 (H200)."""

_LOOKS_EVERY = 16
"""Where addresses do not come again, they are looked for once in so many launches."""

UNKNOWN = 2**64 - 1
"""No address: of a slot that was never patched, or whose patch the driver refused."""

# The head of the table. COUNT: executables. EXPECTED: the one to launch next. LAST: the one launched last. HAND: where
# the search for one to patch begins. STREAK: launches in a row that needed a patch. ALONE: patches, as GROWS_AFTER
# counts them. MOST_OF_THEM: executables there may be. GROWS: ALONE at which there is one more. PATIENCE: STREAK from
# which on the next outputs are patched ahead.
COUNT, EXPECTED, LAST, HAND, STREAK, ALONE, MOST_OF_THEM, GROWS, PATIENCE, HEAD = range(10)
# A row. HANDLE: the executable. NEXT: which one came after it the last time. ADDRESSES: one for each slot.
HANDLE, NEXT, ADDRESSES = range(3)


class Executables:
    """The executables of a graph, which differ in the addresses of their tensors.

    ``table`` says where each of them points. Native code uses it too. Whoever reads or writes it holds the lock of the
    graph's lane.

    Args:
        captured: The ``CUgraph``, which must outlive this object.
        inputs: The slots of the inputs; the address of one without pointers counts as 0.
        outputs: Those of the outputs, likewise.
        stream: A raw handle; the first executable is uploaded there.
        lane: Knows which graph was launched last.
    """

    __slots__ = ("_captured", "_inputs", "_lane", "_pointers", "handles", "nbytes", "table", "width")

    def __init__(
        self, captured: Any, inputs: Sequence[IoSlot], outputs: Sequence[IoSlot], stream: int, lane: StreamOrder
    ) -> None:
        nodes = driver.node_count(captured)
        self._captured = captured
        self._lane = lane
        self._inputs = len(inputs)
        self._pointers = [slot.pointers for slot in (*inputs, *outputs)]
        self.handles: list[Any] = []
        self.width = ADDRESSES + len(self._pointers)
        most = MOST if nodes <= SMALL and any(self._pointers) else 1
        self.nbytes = most * (EXECUTABLE_BYTES + nodes * NODE_BYTES)
        # Of a fixed size, so that it stays where it is.
        self.table = array("Q", [0] * (HEAD + self.width * most))
        self._may_be(most)
        self._keep(driver.instantiate(captured, stream))

    def aim(self, wanted: Sequence[int]) -> Any:
        """The ``CUgraphExec`` to launch now, pointed at an address for each slot, 0 for one without pointers."""
        table, wanted = self.table, list(wanted)
        if self._row(table[EXPECTED]) == wanted:
            table[STREAK] = 0
            return self.handles[table[EXPECTED]]
        streak = table[STREAK]
        looks = streak < table[PATIENCE] or streak % _LOOKS_EVERY == 0 or table[COUNT] < table[MOST_OF_THEM]
        index = self._find(wanted) if looks else None
        if index is None:
            index = self._nearest(wanted) if streak < table[PATIENCE] else table[EXPECTED]
            if table[COUNT] < table[MOST_OF_THEM] and table[ALONE] >= table[GROWS]:
                index = self._add(index)
            self._point(index, wanted)
            table[STREAK] = streak + 1
            self._count(self._lane.last is table)
        else:
            table[STREAK] = 0
        if index != table[EXPECTED]:
            table[HEAD + table[LAST] * self.width + NEXT] = index
            table[EXPECTED] = index
        return self.handles[index]

    def launched(self, outputs: Sequence[int] | None = None) -> None:
        """Note that the expected executable was launched, and expect the one that came after it the last time.

        ``outputs`` are the addresses that the next launch will write to, if they are known. Where addresses do not come
        again, or as long as there is one executable, it is pointed at them now, while the device works.
        """
        table, width = self.table, self.width
        again, self._lane.last = self._lane.last is table, table
        last = table[EXPECTED]
        table[LAST] = last
        following = table[HEAD + last * width + NEXT]
        table[EXPECTED] = following
        if outputs is None:
            return
        start = HEAD + following * width + ADDRESSES
        own, end = start + self._inputs, start + self._inputs + len(outputs)
        if table[own:end].tolist() == outputs:
            return
        full = table[COUNT] == table[MOST_OF_THEM]
        if table[STREAK] >= table[PATIENCE] if full else table[COUNT] == 1 and table[ALONE] < table[GROWS]:
            index = table[HAND]
            start = HEAD + index * width + ADDRESSES
            self._point(index, [*table[start : start + self._inputs], *outputs])
            self._count(again)
            table[EXPECTED] = index
            return
        found = self._find([*table[start:own], *outputs])
        if found is not None:
            table[EXPECTED] = found

    def close(self) -> None:
        """Destroy all executables, even if the driver refuses one; none may be running."""
        with ExitStack() as each:
            while self.handles:
                each.callback(driver.call, "cuGraphExecDestroy", self.handles.pop())

    def _keep(self, handle: Any) -> int:
        """Add an executable to the table, pointed nowhere."""
        index = len(self.handles)
        start = HEAD + index * self.width
        self.table[start + HANDLE] = int(handle)
        for place, pointers in enumerate(self._pointers, start + ADDRESSES):
            self.table[place] = UNKNOWN if pointers else 0
        self.handles.append(handle)
        self.table[COUNT] = index + 1
        return index

    def _add(self, otherwise: int) -> int:
        """One more executable, or ``otherwise`` where the device has no memory for it."""
        try:
            return self._keep(driver.instantiate(self._captured))
        except CudaError:
            self._may_be(len(self.handles))
            return otherwise

    def _may_be(self, most: int) -> None:
        """Set how many executables there may be."""
        self.table[MOST_OF_THEM], self.table[GROWS] = most, GROWS_AFTER
        # After so many patches in a row, addresses do not come again.
        self.table[PATIENCE] = 4 * (most - 1)

    def _count(self, again: bool) -> None:
        """Note a patch, in a launch that follows one of this graph or not."""
        if again:
            self.table[ALONE] += 1
        elif self.table[ALONE]:
            self.table[ALONE] -= 1

    def _row(self, index: int) -> list[int]:
        """Where an executable points."""
        start = HEAD + index * self.width
        return self.table[start + ADDRESSES : start + self.width].tolist()

    def _find(self, wanted: list[int]) -> int | None:
        """Which executable points there."""
        for index in range(len(self.handles)):
            if self._row(index) == wanted:
                return index
        return None

    def _nearest(self, wanted: Sequence[int]) -> int:
        """The executable that differs in the fewest addresses; of several, the first one from the hand on."""
        count, hand = len(self.handles), self.table[HAND]
        turn = [(hand + step) % count for step in range(count)]
        return min(turn, key=lambda index: sum(map(int.__ne__, self._row(index), wanted)))

    def _point(self, index: int, wanted: Sequence[int]) -> None:
        """Patch an executable. What the driver refuses, and what comes after that, is :data:`UNKNOWN` then."""
        table, handle = self.table, self.handles[index]
        start = HEAD + index * self.width + ADDRESSES
        # The driver takes a node's parameters as a whole, and several tensors may stand in one node: all words are
        # written before any node is set.
        for place, (pointers, address) in enumerate(zip(self._pointers, wanted, strict=True), start):
            for pointer in pointers:
                pointer.word.value = address + pointer.offset
            if table[place] != address:
                table[place] = UNKNOWN
        done = set()
        for place, (pointers, address) in enumerate(zip(self._pointers, wanted, strict=True), start):
            if table[place] == address:
                continue
            for pointer in pointers:
                if (node := int(pointer.arguments[0])) not in done:
                    code = pointer.setter(handle, *pointer.arguments)[0]
                    if code:
                        raise driver.failure(pointer.setter.__name__, code)
                    done.add(node)
            table[place] = address
        table[HAND] = (index + 1) % table[COUNT]
