from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.config import modes
from graphcache.errors import ConfigError
from graphcache.runtime import (
    RuntimeCache,
    RuntimeSettings,
    get_cudagraphs_mode,
    runtime_cache,
    runtime_config,
    set_cudagraphs_mode,
    set_dynamic_shapes_kernel_strategy,
)
from tests.engine_modules import load, rows
from tests.engines import fake_tensorrt


def choices(engines: Any) -> list[Any]:
    return [each.runtime_choice for each in engines]


# ---- settings


def test_settings_are_those_of_torch_tensorrt():
    settings = RuntimeSettings(
        dynamic_shapes_kernel_specialization_strategy="none", cuda_graph_strategy="disabled", runtime_cache="a.bin"
    )
    assert settings.merge(runtime_cache=None).runtime_cache is None
    assert settings == settings.merge()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dynamic_shapes_kernel_specialization_strategy", "fast"),
        ("dynamic_shapes_kernel_specialization_strategy", 1),
        ("cuda_graph_strategy", "whole"),
        ("cuda_graph_strategy", None),
        ("runtime_cache", 3),
        ("runtime_cache", b"a"),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}={value!r}"):
        RuntimeSettings(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name}="):
        RuntimeSettings().merge(**{name: value})


@given(st.text(max_size=8).filter(lambda name: name not in RuntimeSettings.__dataclass_fields__))
def test_unknown_settings(name):
    with pytest.raises(ConfigError, match="the settings are dynamic_shapes"):
        RuntimeSettings().merge(**{name: 1})


def test_a_block_sets_all_engines_at_any_depth_and_restores_them(nested):
    module, engines = nested("affine", "scaled")
    engines[1].configure_runtime("lazy")
    before = choices(engines)
    with runtime_config(module, dynamic_shapes_kernel_specialization_strategy="none") as inside:
        assert inside is module
        assert choices(engines) == [("none", None), ("none", None)]
        with pytest.raises(KeyError), runtime_config(engines, dynamic_shapes_kernel_specialization_strategy="lazy"):
            raise KeyError
        assert choices(engines) == [("none", None), ("none", None)]
    assert choices(engines) == before


def test_what_is_not_given_stays(nested):
    module, engines = nested("affine")
    cache = RuntimeCache()
    with (
        runtime_config(module, runtime_cache=cache),
        runtime_config(module, dynamic_shapes_kernel_specialization_strategy="none"),
    ):
        assert choices(engines) == [("none", cache)]


def test_graphs_of_tensorrt_rtx_are_graphs_of_the_engines(fake):
    engine = load("affine")
    with runtime_config(engine, cuda_graph_strategy="whole_graph_capture"):
        assert get_cudagraphs_mode()
        for _ in range(3):
            engine(rows(fake, 2))
        assert engine.with_graphs().cache_info().hits == 2
    assert modes.get().graphs is None
    set_cudagraphs_mode(False)
    with runtime_config(engine, cuda_graph_strategy="whole_graph_capture"):
        assert not get_cudagraphs_mode(), "who switched them off outside has the last word"
    modes.set(modes.get().__class__())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (nn.ReLU(), "there is no TensorRT engine in what was given"),
        ([], "there is no TensorRT engine in what was given"),
        (3, "3 is neither a module nor a list or tuple of modules"),
        ([3], r"expected an nn\.Module, got int"),
        ("engine", "'engine' is neither a module"),
    ],
)
def test_modules_without_an_engine(targets, message):
    for call in (
        lambda: runtime_config(targets, dynamic_shapes_kernel_specialization_strategy="none").__enter__(),
        lambda: set_dynamic_shapes_kernel_strategy(targets, "none"),
        lambda: runtime_cache(targets).__enter__(),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_one_setting_for_good(nested):
    module, engines = nested("affine", "scaled")
    cache = RuntimeCache()
    with runtime_config(module, runtime_cache=cache):
        set_dynamic_shapes_kernel_strategy(module, "none")
        assert choices(engines) == [("none", cache)] * 2
    with pytest.raises(ConfigError, match="is not an option"):
        set_dynamic_shapes_kernel_strategy(module, "quick")


# ---- compiled kernels


def engines_in(kernels: bytes) -> list[str]:
    """Whose kernels the stand-in wrote."""
    version, engines, _ = json.loads(kernels)
    assert version == fake_tensorrt.__version__
    return list(engines)


def test_kernels_are_saved_and_found_again(fake, tmp_path):
    path = tmp_path / "folder" / "kernels.bin"
    engines = [load("affine"), load("scaled")]
    with runtime_cache(engines, path) as cache:
        assert isinstance(cache, RuntimeCache)
        engines[0](rows(fake, 2))
        assert cache.has_cache()
    assert engines_in(path.read_bytes()) == ["Affine"]
    assert [each.name for each in path.parent.iterdir()] == ["kernels.bin"]
    with runtime_cache(load("affine"), str(path)) as cache:
        assert not cache.has_cache()
        load_and_run(fake, cache)
        assert cache._cache._compiled == ["Affine"]


def load_and_run(fake: Any, cache: RuntimeCache) -> None:
    engine = load("affine")
    engine.configure_runtime(kernels=cache)
    engine(rows(fake, 2))


def test_by_setting_too(fake, tmp_path):
    engine = load("affine")
    with runtime_config(engine, runtime_cache=tmp_path / "kernels.bin"):
        engine(rows(fake, 2))
    assert engines_in((tmp_path / "kernels.bin").read_bytes()) == ["Affine"]
    assert choices([engine]) == [(None, None)]


def test_a_stream_is_read_once_and_written_once(fake):
    engine, stream = load("affine"), io.BytesIO()
    with runtime_cache(engine, stream):
        engine(rows(fake, 2))
    assert engines_in(stream.getvalue()) == ["Affine"]
    assert not stream.closed
    stream.seek(0)
    with runtime_cache(engine, stream, autosave=False) as cache:
        engine(rows(fake, 2))
        assert cache._cache._compiled == ["Affine"]


def test_kernels_of_another_version_are_refused_and_said_so(fake, tmp_path, caplog):
    path = tmp_path / "kernels.bin"
    path.write_bytes(b"1.4.0.76\nAffine\n\xff\x00")
    engine = load("affine")
    with runtime_cache(engine, path):
        engine(rows(fake, 2))
    assert f"18 bytes of compiled kernels in {path} were refused by TensorRT" in caplog.text
    assert engines_in(path.read_bytes()) == ["Affine"]


def test_without_any_kernels_the_file_stays_as_it_was(fake, tmp_path):
    path = tmp_path / "kernels.bin"
    path.write_bytes(b"1.5.0.114\nOther")
    with runtime_cache(load("affine"), path):
        pass
    assert path.read_bytes() == b"1.5.0.114\nOther"


def test_a_folder_that_cannot_be_written_costs_no_answer(fake, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    engine = load("affine")
    with runtime_cache(engine, tmp_path / "file" / "kernels.bin"):
        answer = engine(rows(fake, 2))
    assert answer.shape == (2, 4)
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "compiled kernels were not saved" in record.getMessage()


def test_the_exception_of_the_block_is_the_one_that_is_raised(fake, tmp_path):
    (tmp_path / "file").write_text("")
    engine = load("affine")
    with pytest.raises(KeyError), runtime_cache(engine, tmp_path / "file" / "kernels.bin"):
        engine(rows(fake, 2))
        raise KeyError
    assert choices([engine]) == [(None, None)]


@pytest.mark.parametrize("odd", [3, None, b"path", object()])
def test_what_is_no_path(fake, odd):
    with pytest.raises(ConfigError, match=r"^path=.*: expected a path, or an object with read and write$"):
        runtime_cache(load("affine"), odd).__enter__()
    with pytest.raises(ConfigError, match=r"^path=.*: expected the path of a file"):
        RuntimeCache(odd)


def test_what_is_no_stream_of_bytes(fake):
    with pytest.raises(ConfigError, match="a stream of str cannot be loaded"):
        runtime_cache(load("affine"), io.StringIO("text")).__enter__()


def test_a_cache_by_hand(fake, tmp_path):
    cache = RuntimeCache(tmp_path / "a.bin")
    cache.load()
    cache.save()
    assert not (tmp_path / "a.bin").exists()
    load_and_run(fake, cache)
    cache.save()
    cache.save(tmp_path / "b.bin")
    kept = (tmp_path / "a.bin").read_bytes()
    assert (tmp_path / "b.bin").read_bytes() == kept
    assert engines_in(kept) == ["Affine"]
    cache.load(tmp_path / "b.bin")
    assert cache.save_to_stream(io.BytesIO()) == len(kept)
    assert fake_tensorrt.__version__ == "1.5.0.114"
    assert graphcache.runtime.RuntimeCache is RuntimeCache
