from __future__ import annotations

import ctypes
import enum
import importlib
import logging
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from graphcache.engines import library as room
from graphcache.engines import plugins
from graphcache.engines.library import join_messages, library, require_gpu
from graphcache.engines.plugins import load_plugin_library
from graphcache.errors import ConfigError, EngineError, NoGpuError, TensorRTNotFoundError
from tests.engines.test_gate import interrupted_at

FLAVOURS = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")
KEPT: list[Any] = []


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Registry:
    """Stands in for TensorRT's plugin registry: knows what it was asked, answers what it was told."""

    def __init__(self) -> None:
        self.all_creators: list[str] = ["standard"]
        self.asked: list[str] = []
        self.refuses: str | None = None
        self.logger: Any = None

    def load_library(self, plugin_path: str) -> object | None:
        self.asked.append(plugin_path)
        if self.refuses is not None:
            self.logger.log(Severity.ERROR, self.refuses)
            return None
        self.all_creators.append(plugin_path)
        return object()


def stand_in(name: str, version: str = "1.2.3") -> Any:
    """A module with the part of TensorRT's interface that is used here, and no more."""
    module: Any = types.ModuleType(name)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def __init__(self) -> None:
            self.constructed = True

    registry = Registry()
    module.__version__ = version
    module.ILogger = ILogger
    module.registry = registry
    module.get_plugin_registry = lambda: registry
    return module


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_found", {})
    monkeypatch.setattr(plugins, "_plugins", set())
    monkeypatch.delenv("GRAPHCACHE_TENSORRT", raising=False)
    for name in FLAVOURS:
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, module: Any = None) -> Any:
    module = module or stand_in(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_takes_the_first_of_the_order_that_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TensorRTNotFoundError):
        library()
    install(monkeypatch, "tensorrt_lean")
    assert library().flavour == "tensorrt_lean"
    install(monkeypatch, "tensorrt_rtx")
    assert library().flavour == "tensorrt_rtx"
    module = install(monkeypatch, "tensorrt", stand_in("tensorrt", "10.8.0"))
    found = library()
    assert (found.module, found.flavour, found.version) == (module, "tensorrt", "10.8.0")
    assert isinstance(found.logger, module.ILogger)
    assert found.logger.constructed


@pytest.mark.parametrize("before", [True, False])
def test_one_flavour_under_the_name_of_another_is_what_it_is(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """Torch-TensorRT for RTX does that when it is imported, before or after an engine was loaded."""
    module = install(monkeypatch, "tensorrt_rtx")
    found = library() if before else None
    install(monkeypatch, "tensorrt", module)
    assert library().flavour == "tensorrt_rtx"
    assert library() is library("tensorrt") is library("rtx")
    assert found is None or library() is found


@pytest.mark.parametrize("name", ["tensorrt_rtx", "rtx", "tensorrt-rtx", " RTX "])
def test_argument_chooses_and_has_short_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for flavour in FLAVOURS:
        install(monkeypatch, flavour)
    monkeypatch.setenv("GRAPHCACHE_TENSORRT", "lean")
    assert library(name).flavour == "tensorrt_rtx"


def test_environment_chooses_where_no_argument_does(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt")
    install(monkeypatch, "tensorrt_lean")
    for variable, flavour in (("lean", "tensorrt_lean"), (" ", "tensorrt")):
        monkeypatch.setenv("GRAPHCACHE_TENSORRT", variable)
        assert library().flavour == flavour


def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_TENSORRT", "onnx")
    for argument, seen in ((None, "GRAPHCACHE_TENSORRT='onnx'"), ("trt", "library='trt'"), ("", "library=''")):
        with pytest.raises(ConfigError) as caught:
            library(argument)
        assert str(caught.value) == (
            f"{seen} is no flavour of TensorRT; expected one of 'tensorrt', 'tensorrt_rtx' (or 'rtx'), "
            "'tensorrt_lean' (or 'lean')"
        )


def test_nothing_importable_says_what_each_import_said(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {
        "tensorrt": ModuleNotFoundError("No module named 'tensorrt'"),
        "tensorrt_rtx": OSError("libtensorrt_rtx.so.1: cannot open shared object file"),
        "tensorrt_lean": RuntimeError(),
    }

    def import_module(name: str) -> Any:
        raise errors[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError) as caught:
        library()
    assert isinstance(caught.value, TensorRTNotFoundError)
    assert str(caught.value) == (
        "no flavour of TensorRT can be imported. Tried tensorrt: No module named 'tensorrt'; "
        "tensorrt_rtx: libtensorrt_rtx.so.1: cannot open shared object file; tensorrt_lean: RuntimeError. "
        'To install: pip install "graphcache[tensorrt]" (the full TensorRT) or pip install "graphcache[rtx]" '
        '(TensorRT-RTX, which also builds engines without a GPU) or pip install "graphcache[lean]" '
        "(runs engines, builds none)"
    )


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("rtx", "rtx"), ("lean", "lean")])
def test_a_named_flavour_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    named = {"rtx": "tensorrt_rtx", "lean": "tensorrt_lean"}.get(name, name)
    for flavour in FLAVOURS:
        if flavour != named:
            install(monkeypatch, flavour)
    with pytest.raises(TensorRTNotFoundError) as caught:
        library(name)
    message = str(caught.value)
    assert message.startswith(f"{named} cannot be imported. Tried {named}: ")
    assert f'. To install: pip install "graphcache[{extra}]"' in message
    assert message.count("pip install") == 1
    assert caught.value.name == named


def test_an_unrelated_folder_called_tensorrt_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(monkeypatch, "tensorrt", types.ModuleType("tensorrt"))
    folder.__path__ = ["/some/tensorrt"]
    with pytest.raises(TensorRTNotFoundError) as caught:
        library("tensorrt")
    assert "Tried tensorrt: /some/tensorrt was imported, but it is not TensorRT" in str(caught.value)


def test_threads_get_the_same_library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt_rtx")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(library, ["rtx"] * 64))
    assert len({id(each) for each in found}) == 1


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG, "graphcache.tensorrt")
    install(monkeypatch, "tensorrt")
    return library("tensorrt").logger


def test_levels(logger: Any, caplog: pytest.LogCaptureFixture) -> None:
    for severity in [*Severity, "of a later release"]:
        logger.log(severity, "100% of %s")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (level, "100% of %s") for level in ("ERROR", "ERROR", "WARNING", "DEBUG", "DEBUG", "ERROR")
    ]


def test_each_warning_once_and_not_remembered_for_ever(logger: Any, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        logger.log(Severity.WARNING, "slow")
        logger.log(Severity.WARNING, "old")
    assert caplog.messages == ["slow", "old"]
    for index in range(5000):
        logger.log(Severity.WARNING, str(index))
    assert len(logger._warned) <= 1024


def test_collected_errors_are_logged_for_debugging_only(logger: Any, caplog: pytest.LogCaptureFixture) -> None:
    with logger.collect() as outer:
        with logger.collect() as equal:
            pass
        logger.log(Severity.ERROR, "first")
        with logger.collect() as inner:
            logger.log(Severity.INTERNAL_ERROR, "second")
            logger.log(Severity.WARNING, "a warning")
        logger.log(Severity.ERROR, "third")
    logger.log(Severity.ERROR, "fourth")
    assert outer == ["first", "second", "third"]
    assert inner == ["second"]
    assert equal == []
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG", "WARNING", "DEBUG", "ERROR"]


def test_a_message_says_what_the_innermost_block_has_collected(logger: Any) -> None:
    assert logger.said() == "nothing"
    with logger.collect():
        logger.log(Severity.ERROR, "first")
        with logger.collect():
            assert logger.said() == "nothing"
            logger.log(Severity.ERROR, "second")
            assert logger.said() == "second"
        assert logger.said() == "first; second"
    assert logger.said() == "nothing"


def test_errors_of_other_threads_are_not_collected(logger: Any, caplog: pytest.LogCaptureFixture) -> None:
    with logger.collect() as errors, ThreadPoolExecutor(1) as pool:
        pool.submit(logger.log, Severity.ERROR, "elsewhere").result()
    assert errors == []
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(record: logging.LogRecord) -> bool:
        raise request.param

    monkeypatch.setattr(logging.getLogger("graphcache.tensorrt"), "filters", [raising])


@pytest.mark.parametrize("broken", [ValueError("broken handler")], indirect=True)
@pytest.mark.usefixtures("broken")
def test_nothing_is_raised_into_tensorrt(logger: Any) -> None:
    with pytest.raises(IndexError, match="mine"), logger.collect() as errors:
        logger.log(Severity.ERROR, "said")
        raise IndexError("mine")
    logger.log(Severity.ERROR, "said again")
    assert errors == ["said"]


@pytest.mark.parametrize("broken", [KeyboardInterrupt()], indirect=True)
@pytest.mark.usefixtures("broken")
def test_ctrl_c_inside_tensorrt_is_raised_afterwards(logger: Any) -> None:
    with pytest.raises(KeyboardInterrupt), logger.collect() as errors:
        logger.log(Severity.ERROR, "said")
        errors.append("went on")
    assert errors == ["said", "went on"]
    with logger.collect():
        pass


@pytest.mark.parametrize("inner", [True, False])
def test_ctrl_c_at_any_place_ends_the_collecting(logger: Any, caplog: pytest.LogCaptureFixture, inner: bool) -> None:
    def collect() -> None:
        with logger.collect():
            if inner:
                with logger.collect():
                    pass

    for step in range(1, 100):
        come = interrupted_at(step, collect, room.__file__)
        caplog.clear()
        logger.log(Severity.ERROR, "said")
        assert [record.levelname for record in caplog.records] == ["ERROR"], step
        if not come:
            break
    assert 5 < step < 99


def test_messages_in_one_line() -> None:
    echo = "[checkMacros.cpp::catchCudaError::229] Error Code 1"
    assert join_messages([]) == join_messages(["", " \n"]) == "nothing"
    assert join_messages(["a\n  b.", "a b", "c"]) == "a b; c"
    assert join_messages(["Error 4", echo]) == "Error 4"
    assert join_messages([echo]) == echo


class Loader:
    """Stands in for ``ctypes.CDLL``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *exports: str, effect: Any = lambda: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.exports, self.effect = exports, effect
        monkeypatch.setattr(ctypes, "CDLL", self)

    def __call__(self, path: str, mode: int) -> Any:
        self.calls.append((path, mode))
        self.effect()
        return types.SimpleNamespace(**dict.fromkeys(self.exports))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = install(monkeypatch, "tensorrt_rtx", stand_in("tensorrt_rtx", "1.5"))
    module.registry.logger = library("rtx").logger
    return module


@pytest.fixture
def plugin(tmp_path: Any) -> Any:
    file = tmp_path / "plugin.so"
    file.write_bytes(b"not really")
    return file


def test_plugins_that_register_themselves(monkeypatch: pytest.MonkeyPatch, trt: Any, plugin: Any) -> None:
    loader = Loader(monkeypatch, "getCreators", effect=lambda: trt.registry.all_creators.append("mine"))
    load_plugin_library(plugin)
    load_plugin_library(str(plugin.parent / "." / plugin.name), "rtx")
    assert loader.calls == [(str(plugin.resolve()), ctypes.RTLD_GLOBAL)]
    assert trt.registry.asked == []


@pytest.mark.parametrize("entry", ["getCreators", "getPluginCreators"])
def test_plugins_that_the_registry_collects(monkeypatch: pytest.MonkeyPatch, trt: Any, plugin: Any, entry: str) -> None:
    Loader(monkeypatch, entry)
    load_plugin_library(plugin)
    load_plugin_library(plugin)
    assert trt.registry.asked == [str(plugin.resolve())]


def test_standard_plugins_come_first_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, trt: Any, plugin: Any
) -> None:
    calls: list[Any] = []
    trt.init_libnvinfer_plugins = lambda *arguments: calls.append(arguments)
    Loader(monkeypatch, effect=lambda: calls.append("loaded"))
    load_plugin_library(plugin)
    assert calls == [(library("rtx").logger, ""), "loaded"]


def test_a_library_without_plugins_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, trt: Any, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Loader(monkeypatch)
    load_plugin_library(plugin)
    (message,) = caplog.messages
    assert message == (
        f"{plugin.resolve()} was loaded but registered no new plugin with tensorrt_rtx 1.5: it was loaded before by "
        "other means, or built against another flavour of TensorRT"
    )


def test_a_library_that_the_registry_refuses(monkeypatch: pytest.MonkeyPatch, trt: Any, plugin: Any) -> None:
    Loader(monkeypatch, "getCreators")
    trt.registry.refuses = "No creator returned."
    with pytest.raises(EngineError) as caught:
        load_plugin_library(plugin)
    assert str(caught.value) == (
        f"tensorrt_rtx 1.5 registered no plugin of {plugin.resolve()}; it said: No creator returned. It refuses "
        "a library of which a plugin is registered already, or that was built against another version"
    )
    trt.registry.refuses = None
    load_plugin_library(plugin)
    assert len(trt.registry.asked) == 2


@pytest.mark.usefixtures("trt")
def test_a_plugin_file_that_is_missing_or_no_library(plugin: Any) -> None:
    missing = plugin.with_name("none.so").resolve()
    with pytest.raises(EngineError) as caught:
        load_plugin_library(missing)
    assert str(caught.value) == (
        f"{missing!r} is no plugin library: [Errno 2] No such file or directory: '{missing}'; pass the path of a "
        f".so or .dll"
    )
    with pytest.raises(OSError) as loader:
        ctypes.CDLL(str(plugin.resolve()))
    with pytest.raises(EngineError) as caught:
        load_plugin_library(plugin)
    assert str(caught.value) == (
        f"the plugin library {plugin.resolve()} cannot be loaded: {loader.value}. It must be a shared library for this "
        "platform, built against tensorrt_rtx 1.5, and what it links to must be found as well"
    )


@pytest.mark.parametrize(
    ("cuda", "visible", "seen"),
    [
        (
            None,
            None,
            "is a build without CUDA. To go on, install a CUDA build of PyTorch on a machine with an NVIDIA GPU.",
        ),
        ("13.0", None, "is built for CUDA 13.0, but found no device. To go on, check that nvidia-smi lists a GPU, and"),
        ("13.0", "", "is built for CUDA 13.0, but found no device and CUDA_VISIBLE_DEVICES=''. To go on, check that"),
    ],
)
def test_require_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, visible: str | None, seen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(NoGpuError) as caught:
        require_gpu("running a TensorRT engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu("running a TensorRT engine")
    assert str(caught.value).startswith(
        "running a TensorRT engine needs a CUDA device, and torch.cuda.is_available() is False: "
        f"PyTorch {torch.__version__} {seen}"
    )
    assert str(caught.value).endswith(
        "Without a GPU, PyTorch modules still run on host graphs, and TensorRT-RTX still builds engines"
    )


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_real_thing_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, name: str, plugin: Any) -> None:
    monkeypatch.delitem(sys.modules, name)
    real = pytest.importorskip(name)
    found = library(name)
    assert (found.module, found.version) == (real, real.__version__)
    # TensorRT keeps a bare pointer to the first logger that it was given
    KEPT.append(found.logger)
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_plugin_library(plugin, name)
