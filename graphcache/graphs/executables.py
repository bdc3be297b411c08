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
"""How many executables a small graph may have. Torch's allocator hands out what was freed last: a loop that makes an
input and drops an answer in each turn goes through three or four pairs of addresses, a ring of buffers through more."""

SMALL = 32
"""The largest graph, in nodes, that has more than one. Pointing an executable at another address delayed its next
launch by 0.7 µs on one host (H200) and by 3.5 on another (H100), launching another one in turn by 0.3 µs with 3 nodes
but by 10 µs with 106 (driver 580)."""

EXECUTABLE_BYTES = 96 * 1024
"""What an executable takes on the device besides its nodes. The driver has no call that tells: 80 to 128 KiB were seen
with 3 nodes, 192 to 256 with 106 (H100, driver 580)."""

NODE_BYTES = 2 * 1024
"""What each node adds."""

GROWS_AFTER = 32
"""How often an executable was pointed elsewhere, in a graph that was also launched the last time, before there is one
more: not in the trials of a new graph, not for one that is hardly used or always with the same tensors, and not for
graphs that take turns, each of which takes one from it. With 32 graphs of 3 nodes in turn, eight executables each took
4.5 µs longer than the bare launch and one each 1.1; with one graph it was 0.7 and 1.5 (H200)."""

_LOOKS_EVERY = 16
"""Where addresses do not come again, they are looked for once in so many launches."""

UNKNOWN = 2**64 - 1
"""No address: of a slot that nobody has pointed yet, or where the driver refused half way."""

# The head of the table: how many executables there are, which one is expected to be launched next, which was launched
# last, where the search for one to point elsewhere begins; how many launches in a row had to point one elsewhere, and
# how many more of those followed a launch of this graph than did not. Then how many executables there may be, at which
# of the last number there is one more, and after how many launches of the one before outputs are pointed at ahead.
COUNT, EXPECTED, LAST, HAND, STREAK, ALONE, MOST_OF_THEM, GROWS, PATIENCE, HEAD = range(10)
# A row: the handle, which executable came after this one the last time, and an address for each slot.
HANDLE, NEXT, ADDRESSES = range(3)


class Executables:
    """What a graph is launched by: up to :data:`MOST` executables, which differ in the addresses of their tensors.

    ``table`` says where each of them points. It is read and written by compiled code too, and by whoever holds the lock
    of the graph's lane; nobody else may.

    Args:
        captured: The ``CUgraph``, which must outlive this object.
        inputs: The slots of the inputs; the address of one without pointers counts as 0.
        outputs: Those of the outputs, likewise.
        stream: A raw handle; the first executable is uploaded there.
        lane: Knows which graph was launched last.

    Raises:
        CudaError: If the driver refuses to instantiate.
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
        """The executable to launch now: one that is pointed at these addresses already, or else is from now on.

        Args:
            wanted: An address for each slot, 0 for one without pointers.

        Returns:
            A ``CUgraphExec``.

        Raises:
            CudaError: If the driver refuses. Nothing is taken for pointed that is not.
        """
        table, wanted = self.table, list(wanted)
        if self._row(table[EXPECTED]) == wanted:
            table[STREAK] = 0
            return self.handles[table[EXPECTED]]
        streak = table[STREAK]
        if streak < table[PATIENCE] or streak % _LOOKS_EVERY == 0 or table[COUNT] < table[MOST_OF_THEM]:
            index = self._find(wanted)
        else:
            index = None
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

        Args:
            outputs: Addresses that the next launch will write to, if they are known. Where addresses do not come again,
                or as long as there is but one executable, it is pointed at them now, while the device works.

        Raises:
            CudaError: If the driver refuses that.
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
        """Destroy all of them, even if the driver refuses one; none may be running."""
        with ExitStack() as each:
            while self.handles:
                each.callback(driver.call, "cuGraphExecDestroy", self.handles.pop())

    def _keep(self, handle: Any) -> int:
        index = len(self.handles)
        start = HEAD + index * self.width
        self.table[start + HANDLE] = int(handle)
        for place, pointers in enumerate(self._pointers, start + ADDRESSES):
            self.table[place] = UNKNOWN if pointers else 0
        self.handles.append(handle)
        self.table[COUNT] = index + 1
        return index

    def _add(self, otherwise: int) -> int:
        """One more; none, but the other one, where the device has no room for it."""
        try:
            return self._keep(driver.instantiate(self._captured))
        except CudaError:
            self._may_be(len(self.handles))
            return otherwise

    def _may_be(self, most: int) -> None:
        self.table[MOST_OF_THEM], self.table[GROWS] = most, GROWS_AFTER
        # With all of them pointed elsewhere as often as this, addresses do not come again.
        self.table[PATIENCE] = 4 * (most - 1)

    def _count(self, again: bool) -> None:
        """Note that one was pointed elsewhere."""
        if again:
            self.table[ALONE] += 1
        elif self.table[ALONE]:
            self.table[ALONE] -= 1

    def _row(self, index: int) -> list[int]:
        start = HEAD + index * self.width
        return self.table[start + ADDRESSES : start + self.width].tolist()

    def _find(self, wanted: list[int]) -> int | None:
        """Which one is pointed there."""
        for index in range(len(self.handles)):
            if self._row(index) == wanted:
                return index
        return None

    def _nearest(self, wanted: Sequence[int]) -> int:
        """The one that differs in the fewest addresses; of several, the first one from the hand on."""
        count, hand = len(self.handles), self.table[HAND]
        turn = [(hand + step) % count for step in range(count)]
        return min(turn, key=lambda index: sum(map(int.__ne__, self._row(index), wanted)))

    def _point(self, index: int, wanted: Sequence[int]) -> None:
        table, handle = self.table, self.handles[index]
        start = HEAD + index * self.width + ADDRESSES
        # The driver takes a node's parameters as a whole, and several tensors may stand in one node: all are written
        # before it is asked for any. What it refuses, and what comes after that, is known to be unknown.
        place = start
        for pointers in self._pointers:
            address = wanted[place - start]
            for pointer in pointers:
                pointer.word.value = address + pointer.offset
            if table[place] != address:
                table[place] = UNKNOWN
            place += 1
        place, told = start, set()
        for pointers in self._pointers:
            address = wanted[place - start]
            if table[place] != address:
                for pointer in pointers:
                    if (node := int(pointer.arguments[0])) in told:
                        continue
                    code = pointer.setter(handle, *pointer.arguments)[0]
                    if code:
                        raise driver.failure(pointer.setter.__name__, code)
                    told.add(node)
                table[place] = address
            place += 1
        table[HAND] = (index + 1) % table[COUNT]
