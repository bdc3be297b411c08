"""Kernels that were compiled at run time, kept for later engines and processes, over the stand-in."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphcache
from graphcache import EngineModule
from graphcache.engines import kernel_cache
from graphcache.engines.store import user_store
from tests.engine_modules import rows
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IExecutionContext, IRuntimeCache, serialize
from tests.graphs.fake_driver import Torch
from tests.standins import engines, in_a_new_process


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Torch]:
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(IExecutionContext, "_compiled", [])
    with engines(monkeypatch) as fake:
        yield fake


def run(fake: Torch, *counts: int, keep: bool = True) -> list[str]:
    """What a module compiles for some numbers of rows."""
    module = EngineModule(serialize("affine"), keep_kernels=keep)
    before = len(IExecutionContext._compiled)
    for count in counts:
        module(rows(fake, count))
    module.close()
    return IExecutionContext._compiled[before:]


def test_what_one_module_compiled_the_next_one_has(fake: Torch) -> None:
    assert len(run(fake, 1, 2)) == 2
    assert run(fake, 1, 2) == []
    assert len(run(fake, 2, 3)) == 1
    assert run(fake, 1, 2, 3) == []


def test_nothing_is_kept_unasked(fake: Torch) -> None:
    assert len(run(fake, 1, keep=False)) == 1
    assert len(run(fake, 1, keep=False)) == 1
    assert user_store().entries() == []


def test_another_process_has_them_too(fake: Torch) -> None:
    run(fake, 2)
    code = """
from tests.engines.fake_tensorrt import IExecutionContext, serialize
module = graphcache.load(serialize("affine"), keep_kernels=True)
for count in (2, 3):
    module(torch.ones(count, 4))
print(len(IExecutionContext._compiled))
"""
    assert in_a_new_process(code) == "1\n"
    # It was never closed: the end of the process has kept what was new.
    assert run(fake, 2, 3) == []


def test_they_are_those_of_one_engine_version_and_device(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fake, 2)
    other = EngineModule(serialize("scaled"), keep_kernels=True)
    other(fake.driver.heap.tensor([1.0, 2.0]))
    other.close()
    monkeypatch.setattr(kernel_cache, "_device", lambda: "another")
    assert len(run(fake, 2)) == 1
    assert len({each.key for each in user_store().entries()}) == 3


def test_kernels_that_tensorrt_refuses_are_compiled_again(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    run(fake, 2)
    (entry,) = user_store().entries()
    user_store().put(entry.kind, entry.key, b"not what TensorRT wrote", entry.note)
    assert len(run(fake, 2)) == 1
    assert "compiled kernels that were kept for Affine were refused by TensorRT" in caplog.text


def test_saving_while_it_serves(fake: Torch) -> None:
    module = EngineModule(serialize("affine"), keep_kernels=True)
    assert not module.save_kernels()
    module(rows(fake, 2))
    assert module.save_kernels()
    assert not module.save_kernels()
    assert run(fake, 2) == []
    assert not EngineModule(serialize("affine")).save_kernels()


def test_a_module_that_is_dropped_keeps_them(fake: Torch) -> None:
    module = EngineModule(serialize("affine"), keep_kernels=True)
    module(rows(fake, 2))
    del module
    gc.collect()
    assert run(fake, 2) == []


def test_fewer_kernels_do_not_take_the_place_of_more(fake: Torch) -> None:
    first, second = (EngineModule(serialize("affine"), keep_kernels=True) for _ in range(2))
    for module, counts in ((first, (1, 2, 3)), (second, (1,))):
        for count in counts:
            module(rows(fake, count))
    first.close()
    second.close()
    assert run(fake, 1, 2, 3) == []


def test_a_folder_that_cannot_be_used_is_no_error(
    fake: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path / "file"))
    assert len(run(fake, 2)) == 1
    assert "kernels cannot be" in caplog.text


def test_nobody_waits_long_for_a_lock_that_another_holds(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_cache, "_LOCK_SECONDS", 0.05)
    module = EngineModule(serialize("affine"), keep_kernels=True)
    module(rows(fake, 2))
    with user_store().lock(module.engine._own_kernels.key):  # type: ignore[union-attr]
        assert not module.save_kernels()
    assert "kernels cannot be kept" in caplog.text
    assert module.save_kernels()


def test_a_tensorrt_without_a_runtime_cache(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake_tensorrt, "DynamicShapesKernelSpecializationStrategy")
    assert len(run(fake, 2)) == 1
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch, engines(patch) as other:
        patch.delattr(IRuntimeCache, "serialize")
        run(other, 2)


def test_packages_and_copies(fake: Torch, tmp_path: Path) -> None:
    run(fake, 2)
    EngineModule(serialize("affine")).save(tmp_path / "m.gcache")
    before = len(IExecutionContext._compiled)
    module = graphcache.load(tmp_path / "m.gcache", keep_kernels=True)
    module(rows(fake, 2))
    assert IExecutionContext._compiled[before:] == []
