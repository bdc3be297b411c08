"""The compiled guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def library(compiled: Any) -> Any:
    return compiled


@pytest.fixture(params=["shortcuts", "in full"])
def new_guard(library: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The type; with version tags and watchers, and as it is where CPython's cannot be trusted."""
    before = library.use_shortcuts(request.param == "shortcuts")
    if request.param == "shortcuts" and not before:
        library.use_shortcuts(False)
        pytest.skip("this Python misses writes")
    yield library.Guard
    library.use_shortcuts(before)
