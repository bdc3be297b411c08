"""Where in the user's source an operation was called, and in which submodule."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])
_INNER = ("observe", "modules", "graphs", "cache", "engines")
"""Rooms of the package that stand between a user's line and the operation."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of source.

    Args:
        file: Its path, as Python knows it.
        line: Counted from 1; 0 if it is not known.
        code: The line itself, without indentation; empty if the source is not there.
        module: Path of the submodule whose code it is; empty for the module itself.
    """

    file: str
    line: int
    code: str
    module: str


class Places:
    """Finds the places of one module's operations.

    Args:
        module: The module; its submodules' names are read once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(each): name for name, each in module.named_modules()}

    def here(self, outermost: FrameType) -> Place:
        """The place that is being executed: the innermost line that is neither PyTorch's nor this package's own.

        Args:
            outermost: The frame that called the module; where no line lies inside of it (a container of PyTorch's own
                layers), the innermost line of PyTorch's layers is given.
        """
        frame: FrameType | None = sys._getframe(1)
        user = layer = None
        name = None
        while frame is not None and frame is not outermost:
            file = frame.f_code.co_filename
            if user is None and not _is_inner(file):
                user = frame
            if layer is None and "/nn/modules/" in file.replace("\\", "/") and not file.endswith("module.py"):
                layer = frame
            if name is None:
                name = self._names.get(id(_first_argument(frame)))
            frame = frame.f_back
        found = user or layer
        if found is None:
            return Place("", 0, "", name or "")
        line = found.f_lineno or 0
        code = linecache.getline(found.f_code.co_filename, line).strip()
        return Place(found.f_code.co_filename, line, code, name or "")


def assignment(module: nn.Module, attribute: str, name: str) -> Place:
    """The line of a module's class that assigns an attribute of it; that of its ``forward`` if none is found.

    Args:
        module: The module.
        attribute: The attribute.
        name: Path of the module.
    """
    kind = type(module)
    pattern = re.compile(rf"\b\w+\.{re.escape(attribute)}\b\s*(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)")
    try:
        file = inspect.getsourcefile(kind) or ""
        lines, first = inspect.getsourcelines(kind)
        in_init = False
        for offset, line in enumerate(lines):
            if (defined := re.match(r"\s*(?:async\s+)?def\s+(\w+)", line)) is not None:
                in_init = defined[1] == "__init__"
            if not in_init and pattern.search(line):
                return Place(file, first + offset, line.strip(), name)
        function = inspect.unwrap(kind.forward)
        return Place(file, function.__code__.co_firstlineno, "", name)
    except (OSError, TypeError, AttributeError):
        # Made without a file, or compiled.
        return Place("", 0, "", name)


def _is_inner(file: str) -> bool:
    if file.startswith((_TORCH, "<frozen")):
        return True
    if not file.startswith(_OWN):
        return False
    return Path(file[len(_OWN) + 1 :]).parts[0] in _INNER


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
