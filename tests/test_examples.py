"""Every example in a docstring is run."""

from __future__ import annotations

import contextvars
import doctest
import importlib
from pathlib import Path

import pytest

import graphcache

PACKAGE = Path(graphcache.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_examples_of_a_file(file: Path) -> None:
    if file.parent.name == "integrations":
        pytest.importorskip(file.stem)
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    module, said = importlib.import_module(name), list[str]()
    # A class of an example is the user's, not one of graphcache.
    names = {**vars(module), "__name__": "__main__"}
    found = [test for test in doctest.DocTestFinder().find(module, name, globs=names) if test.examples]
    assert found
    for test in found:
        # An example may set modes of the thread.
        contextvars.copy_context().run(doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run, test, out=said.append)
    assert not said, "".join(said)
