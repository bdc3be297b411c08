"""Runs a kernel written in PTX on the CPU, thread by thread: as much of PTX as graphcache's own kernels use.

Every access of memory is checked: it lies in one of the given buffers, and its address is divisible by its size, as the
device demands. What is not known is an error, so that nothing passes for executed that was not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

_INSTRUCTION = re.compile(r"(?:@(?P<guard>%\w+)\s+)?(?P<name>[a-z][\w.]*)(?:\s+(?P<operands>[^;]*))?;")
_WIDTH = {"u8": 1, "u32": 4, "v4": 16}


class Fault(AssertionError):
    """What a device would answer with an error, or would not understand."""


class Buffers:
    """Device memory, by address."""

    def __init__(self) -> None:
        self._found: dict[int, bytearray] = {}

    def put(self, address: int, data: bytes) -> bytearray:
        """Lay a buffer somewhere; it must not touch another one."""
        self._found[address] = bytearray(data)
        return self._found[address]

    def at(self, address: int, nbytes: int) -> tuple[bytearray, int]:
        """The buffer that an access lies in, and where."""
        if address % nbytes:
            raise Fault(f"{nbytes} bytes at {address:#x}, which is no multiple of that")
        for start, data in self._found.items():
            if start <= address and address + nbytes <= start + len(data):
                return data, address - start
        raise Fault(f"{nbytes} bytes at {address:#x}, where there is nothing")


def run(source: str, name: str, argument: bytes, memory: Buffers, grid: Sequence[int], threads: int) -> None:
    """Launch an entry of some PTX.

    Args:
        source: The module.
        name: Of the entry, which takes one argument.
        argument: The argument.
        memory: What it reads and writes.
        grid: Blocks in x and y.
        threads: Of a block.
    """
    code, labels = _parse(source, name)
    for y, x, thread in itertools.product(range(grid[1]), range(grid[0]), range(threads)):
        special = {"%ctaid.x": x, "%ctaid.y": y, "%nctaid.x": grid[0], "%ntid.x": threads, "%tid.x": thread}
        _Thread(code, labels, argument, memory, special).run()


def _parse(source: str, name: str) -> tuple[list[tuple[str | None, str, list[str]]], dict[str, int]]:
    start = source.index("{", source.index(f".entry {name}("))
    code: list[tuple[str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in source[start + 1 : source.index("\n}", start)].splitlines():
        text = line.strip()
        if not text or text.startswith(".reg"):
            continue
        if text.endswith(":"):
            labels[text[:-1]] = len(code)
            continue
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise Fault(f"not understood: {text}")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found["operands"] or "")
        code.append((found["guard"], found["name"], operands))
    return code, labels


class _Thread:
    def __init__(
        self, code: Any, labels: dict[str, int], argument: bytes, memory: Buffers, special: dict[str, int]
    ) -> None:
        self._code = code
        self._labels = labels
        self._argument = argument
        self._memory = memory
        self._registers: dict[str, int] = dict(special)

    def run(self) -> None:
        at, steps = 0, 0
        while (steps := steps + 1) < 100_000:
            guard, name, operands = self._code[at]
            at += 1
            if guard is not None and not self._registers[guard]:
                continue
            if name == "ret":
                return
            if name == "bra":
                at = self._labels[operands[0]]
            elif name != "griddepcontrol.wait":
                self._step(name.split("."), operands)
        raise Fault("it does not end")

    def _value(self, operand: str) -> int:
        if operand == "copies":
            return 0
        return self._registers[operand] if operand.startswith("%") else int(operand)

    def _place(self, operand: str) -> int:
        register, _, offset = operand.strip("[]").partition("+")
        return self._value(register) + int(offset or 0)

    def _step(self, name: list[str], operands: list[str]) -> None:
        kind = name[0]
        if kind in ("ld", "st"):
            self._access(kind, name[1:], operands)
            return
        target, *given = operands
        values = [self._value(each) for each in given]
        if kind in ("mov", "cvt", "cvta"):
            result = values[0]
        elif kind == "add":
            result = values[0] + values[1]
        elif kind == "mul":
            assert name[1] == "wide"
            result = values[0] * values[1]
        elif kind == "mad":
            assert name[1] == "lo"
            result = values[0] * values[1] + values[2]
        elif kind in ("or", "and"):
            result = values[0] | values[1] if kind == "or" else values[0] & values[1]
        elif kind == "shl":
            result = values[0] << values[1]
        elif kind == "setp":
            result = int({"eq": values[0] == values[1], "ge": values[0] >= values[1]}[name[1]])
        else:
            raise Fault(f"not understood: {'.'.join(name)}")
        # Registers are as wide as the last part of the name says; the product of two narrow ones is twice as wide.
        bits = 64 if kind == "mul" else int(re.sub(r"\D", "", name[-1]))
        self._registers[target] = result % (1 << bits)

    def _access(self, kind: str, name: list[str], operands: list[str]) -> None:
        if name[0] == "param":
            register, place = operands
            start = self._place(place)
            self._registers[register] = int.from_bytes(self._argument[start : start + 8], "little")
            return
        assert name[0] == "global"
        nbytes = _WIDTH[name[1]]
        register, place = operands if kind == "ld" else operands[::-1]
        registers = re.findall(r"%\w+", register)
        data, start = self._memory.at(self._place(place), nbytes)
        each = nbytes // len(registers)
        for index, single in enumerate(registers):
            part = slice(start + index * each, start + (index + 1) * each)
            if kind == "ld":
                self._registers[single] = int.from_bytes(data[part], "little")
            else:
                data[part] = (self._registers[single] % (1 << 8 * each)).to_bytes(each, "little")
