"""What a captured miss of an engine calls, counted instead of timed: functions of the package, and their files.

The target is 250 calls in 20 files: a miss should be short enough to be read in one go.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from tests.engines.fake_tensorrt import serialize
from tests.graphs.fake_driver import Torch
from tests.standins import engines

MOST_CALLS = {"the first miss": 238, "a further miss": 238}
MOST_FILES = 20
"""What it was when this test was written. Lower them when it is less; the target is 250 calls in 20 files."""

PACKAGE = str(Path(graphcache.__file__).parent)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with engines(monkeypatch) as fake:
        yield fake


def functions_of(call: Callable[[], object]) -> Counter[tuple[str, str]]:
    """How often each function of the package is called, by file and name.

    Comprehensions and lambdas are left out: whether they are calls depends on the version of Python. Each step of a
    generator is a call.
    """
    found: Counter[tuple[str, str]] = Counter()

    def notice(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            found[code.co_filename[len(PACKAGE) + 1 :], code.co_name] += 1

    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_a_captured_miss_of_an_engine(fake: Torch, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(count: int) -> Tensor:
        return fake.driver.heap.tensor([[float(row + column) for column in range(4)] for row in range(count)])

    def misses() -> list[Counter[tuple[str, str]]]:
        """The first capture of a module, and a further one."""
        fast = graphcache.wrap(graphcache.load(serialize("affine"), name="affine"))
        with torch.no_grad(), fake.on(fake.new_stream()):
            found = [functions_of(lambda x=x: fast(x)) for x in (rows(2), rows(3))]  # type: ignore[misc]
            assert (fast.cache_info().captures, fast.cache_info().eager) == (2, {})
            assert torch.equal(fast(rows(3)), rows(3) * 3 + 1)
        return found

    # What is made once per process is not counted, nor what a collection closes.
    misses()
    gc.collect()
    for (which, most), found in zip(MOST_CALLS.items(), misses(), strict=True):
        files = {file for file, _ in found}
        with capsys.disabled():
            print(f"\n{which} of an engine: {found.total()} calls of {len(found)} functions in {len(files)} files")
        assert found.total() <= most, found.most_common(20)
        assert len(files) <= MOST_FILES, sorted(files)
