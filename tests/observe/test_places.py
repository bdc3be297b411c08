"""Lines and submodules of operations, and of assignments."""

import functools
import sys

import pytest
import torch
from torch import nn

from graphcache.observe.places import Place, Places, assignment


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        self.other = self.count == 1
        return self.where(x)

    def where(self, x):
        return self.found()  # here


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.parts = nn.ModuleList([inner])

    def forward(self, x):
        return functools.reduce(lambda value, part: part(value), self.parts, x)


def test_the_innermost_line_of_the_user_and_the_module_whose_code_it_is():
    inner = Inner()
    outer = Outer(inner)
    places, frame = Places(outer), sys._getframe()
    inner.found = lambda: places.here(frame)
    found = outer(torch.zeros(1))
    assert (found.file, found.module) == (__file__, "parts.0")
    assert found.code == "inner.found = lambda: places.here(frame)"


@pytest.mark.parametrize(
    ("attribute", "code"), [("count", "self.count += 1"), ("other", "self.other = self.count == 1")]
)
def test_the_line_that_assigns(attribute, code):
    found = assignment(Inner(), attribute, "parts.0")
    assert (found.file, found.code, found.module) == (__file__, code, "parts.0")
    with open(__file__, encoding="utf-8") as file:
        assert file.read().splitlines()[found.line - 1].strip() == code


def test_an_attribute_that_no_line_assigns_is_that_of_forward():
    found = assignment(Inner(), "nowhere", "")
    with open(__file__, encoding="utf-8") as file:
        assert file.read().splitlines()[found.line - 1].strip() == "def forward(self, x):"


def test_without_source_there_is_a_place_without_a_line():
    kind = type("Made", (nn.Module,), {"forward": len})
    assert assignment(kind(), "x", "a") == Place("", 0, "", "a")
