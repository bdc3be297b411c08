"""Shapes as they are typed: the grammar of trtexec and that of Polygraphy.

::

    x:8x64                     one shape
    x:[8,64]                   the same
    x:1x64:8x64:64x64          a range: smallest, usual, largest
    x:[1,64],mask:[1]          several inputs, separated by commas or spaces
    tokens:[1,16]:int64        with a dtype, where a command asks for one
    s:[]                       no dimensions at all
    'input:0':1x64             a name with a colon, a comma or a space in it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

_LARGEST = 2**63 - 1
_SEPARATORS = re.compile(r"[\s,]*")
_NAME = re.compile(r"[^\s,:'\"]+")
_QUOTED = re.compile(r"'[^']+'|\"[^\"]+\"")
_SIZE = re.compile(r"[0-9]+")
_DTYPE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"(?P<name>'[^']+'|\"[^\"]+\"|[^-\s,:'\"][^\s,:'\"]*):[0-9\[].*")


class ShapeSyntaxError(ValueError):
    """Text that is no shape; the message shows where."""

    def __init__(self, expected: str, text: str, position: int) -> None:
        self.text = text
        self.position = position
        shown = "".join(" " if character.isspace() else character for character in text)
        super().__init__(f"{expected} at column {position + 1}:\n  {shown}\n  {' ' * position}^")


@dataclass(frozen=True, slots=True)
class Spec:
    """What was said of one input.

    Args:
        name: Its name.
        shapes: One shape, or three: smallest, usual, largest.
        dtype: As written, or ``None``.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: str | None = None

    def __str__(self) -> str:
        shapes = [f"[{','.join(map(str, shape))}]" for shape in self.shapes]
        return ":".join([quoted(self.name), *shapes, *([self.dtype] if self.dtype else [])])


def parse(text: str) -> tuple[Spec, ...]:
    """The inputs in a text, in its order."""
    return _Scanner(text).specs()


def looks_like(word: str) -> bool:
    """Whether a word on the command line is meant as a shape, be it well formed or not."""
    return _WORD.fullmatch(word) is not None


def quoted(name: str) -> str:
    """A name as it must be written, in quotes if it holds a separator."""
    if _NAME.fullmatch(name):
        return name
    return f'"{name}"' if "'" in name else f"'{name}'"


def written(shape: Sequence[int]) -> str:
    """A shape as trtexec writes it; ``[]`` without dimensions."""
    return "x".join(map(str, shape)) if shape else "[]"


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def specs(self) -> tuple[Spec, ...]:
        found: dict[str, Spec] = {}
        self.take(_SEPARATORS)
        while self.at < len(self.text) or not found:
            start = self.at
            spec = self.spec()
            if spec.name in found:
                raise self.error(f"{spec.name!r} is named twice; expected another input", start)
            found[spec.name] = spec
            end = self.at
            if not self.take(_SEPARATORS) and end < len(self.text):
                raise self.error("expected ':', ',' or the end")
        return tuple(found.values())

    def spec(self) -> Spec:
        name = self.name()
        self.expect(":", f"expected ':' and a shape after the name {name!r}")
        shapes, dtype = [self.shape()], ""
        while not dtype and self.skip(":"):
            dtype = self.take(_DTYPE)
            if not dtype:
                shapes.append(self.shape())
        if len(shapes) not in (1, 3):
            raise self.error(f"{len(shapes)} shapes for {name!r}; expected one, or three (smallest, usual, largest)")
        return Spec(name, tuple(shapes), dtype or None)

    def name(self) -> str:
        if found := self.take(_QUOTED):
            return found[1:-1]
        if found := self.take(_NAME):
            return found
        raise self.error("expected the name of an input, such as x in x:1x64")

    def shape(self) -> Shape:
        if not self.skip("["):
            return self.sizes("x")
        self.blanks()
        if self.skip("]"):
            return ()
        sizes = self.sizes(",")
        self.expect("]", "expected ',' or ']'")
        return sizes

    def sizes(self, separator: str) -> Shape:
        sizes = [self.size()]
        while True:
            if separator == ",":
                self.blanks()
            if not self.skip(separator):
                return tuple(sizes)
            if separator == ",":
                self.blanks()
            sizes.append(self.size())

    def size(self) -> int:
        start = self.at
        digits = self.take(_SIZE)
        if not digits:
            raise self.error("expected a size (a whole number, 0 or more)")
        if len(digits) > len(str(_LARGEST)) or int(digits) > _LARGEST:
            raise self.error(f"expected a size of at most {_LARGEST}", start)
        return int(digits)

    def take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found.group()

    def blanks(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def skip(self, character: str) -> bool:
        if self.text[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True

    def expect(self, character: str, otherwise: str) -> None:
        if not self.skip(character):
            raise self.error(otherwise)

    def error(self, expected: str, position: int | None = None) -> ShapeSyntaxError:
        return ShapeSyntaxError(expected, self.text, self.at if position is None else position)
