"""What prevents a graph, with source lines and submodules."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from dataclasses import dataclass, replace
from types import CodeType, FrameType

from torch import nn

from graphcache.capture.blame import path_here
from graphcache.errors import Cause, Reason
from graphcache.keys.user_code import is_library


@dataclass(frozen=True, slots=True)
class Place:
    """A line of source.

    Args:
        file: Its path, as Python knows it; empty if there is none.
        line: Counted from 1; 0 if it is not known.
        code: The line itself, without indentation; empty if there is no source.
        module: Path of the submodule whose code it is; empty for the module itself.
    """

    file: str = ""
    line: int = 0
    code: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class Break:
    """An operation that prevents a graph.

    Args:
        reason: The reason for which a call of the module would run eagerly.
        operation: The function that was called, such as ``"Tensor.item"``, or what was changed.
        place: The line, and the submodule whose code it is.
        detail: More about it; empty if the reason says all.
        remedy: What would change it.
        times: How often the call did it at this line.
    """

    reason: Reason
    operation: str
    place: Place
    detail: str
    remedy: str
    times: int = 1

    def __str__(self) -> str:
        place = self.place
        where = f"{place.file}:{place.line}" if place.file else "(no source)"
        inside = f" in {place.module}" if place.module else ""
        detail = f", {self.detail}" if self.detail else ""
        often = f" ({self.times} times)" if self.times > 1 else ""
        code = f"\n    {place.code}" if place.code else ""
        return (
            f"{where}{inside}: {self.operation}{often}: {self.reason.value}, {self.reason.sentence}{detail}."
            f"{code}\n    To change that: {self.remedy}."
        )


class Findings:
    """The breaks of one call; frames outside of the function with the code ``caller`` are not looked at."""

    def __init__(self, module: nn.Module, caller: CodeType) -> None:
        self.found: dict[tuple[Reason, str, Place], Break] = {}
        self.called = ""
        """The outermost function of PyTorch that is running, as users call it."""
        self.muted = False
        """Set while something runs that has been noted as a whole."""
        self._module, self._caller = module, caller
        self._changed: set[str] = set()

    def note(self, reason: Reason, operation: str, remedy: str, detail: str = "") -> None:
        """Note the operation that is running."""
        if not self.muted:
            self.add(Break(reason, self.called or operation, self._here(), detail, remedy))

    def add(self, found: Break) -> None:
        """Note a break, or count it if it is known."""
        key = (found.reason, found.operation, found.place)
        known = self.found.get(key)
        self.found[key] = found if known is None else replace(known, times=known.times + 1)

    def effect(self, cause: Cause, operation: str) -> None:
        """Note an effect of the call, as :func:`graphcache.capture.effects.observe` reports it."""
        if cause.reason is Reason.HOST_READ and operation.startswith("Tensor."):
            # The modes note reads of tensors: they know which tensors lie on the host.
            return
        if operation:
            self._changed.add(cause.where)
            self.note(cause.reason, operation, cause.reason.remedy, cause.detail)
            return
        if cause.reason is Reason.RANDOM:
            known = any(reason is Reason.RANDOM for reason, _, _ in self.found)
        else:
            known = cause.where in self._changed
            self._changed.add(cause.where)
        if not known:
            self.add(self._state_change(cause))

    def _here(self) -> Place:
        """The innermost line of the user's that is running; where there is none, that of a layer of PyTorch."""
        frame: FrameType | None = sys._getframe(1)
        line = layer = None
        while line is None and frame is not None and frame.f_code is not self._caller:
            name = frame.f_globals.get("__name__")
            if not frame.f_code.co_filename.startswith("<frozen") and not (name is not None and is_library(name)):
                line = frame
            elif layer is None and str(name).startswith("torch.nn.modules.") and name != nn.Module.__module__:
                layer = frame
            frame = frame.f_back
        found, submodule = line or layer, path_here(self._module)
        if found is None:
            return Place(module=submodule)
        file, number = found.f_code.co_filename, found.f_lineno or 0
        return Place(file, number, linecache.getline(file, number).strip(), submodule)

    def _state_change(self, cause: Cause) -> Break:
        """The break for a change of state that was found after the call, such as of ``self.blocks[2].calls``."""
        module, submodule, attribute = self._module, "", ""
        root, *parts = re.sub(r"\[(?:'([^']*)'|(\d+))\]", r".\1\2", cause.where).split(".")
        for part in parts if root == "self" else []:
            child = dict(module.named_children()).get(part)
            if child is None:
                attribute = part
                break
            module, submodule = child, f"{submodule}.{part}".removeprefix(".")
        place = _assignment(module, attribute, submodule) if attribute else Place(module=submodule)
        operation = f"attribute {attribute!r}" if attribute else cause.where
        remedy = "keep the state outside the module, or in a tensor that is passed and returned"
        if cause.reason is Reason.RANDOM:
            remedy = cause.reason.remedy
        return Break(
            cause.reason, operation, place, f"{cause.where}: {cause.detail}; a replay would not do that", remedy
        )


def _assignment(module: nn.Module, attribute: str, name: str) -> Place:
    """The line of a module's class, outside of its constructor, that assigns an attribute; or that of ``forward``."""
    pattern = re.compile(rf"\b\w+\.{re.escape(attribute)}\b\s*(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)")
    try:
        file = inspect.getsourcefile(type(module)) or ""
        lines, first = inspect.getsourcelines(type(module))
        function = ""
        for number, line in enumerate(lines, first):
            if (defined := re.match(r"\s*(?:async\s+)?def\s+(\w+)", line)) is not None:
                function = defined[1]
            if function != "__init__" and pattern.search(line):
                return Place(file, number, line.strip(), name)
        return Place(file, inspect.unwrap(type(module).forward).__code__.co_firstlineno, "", name)
    except (OSError, TypeError, AttributeError):
        # A class without a file, or compiled.
        return Place(module=name)
