"""The compiled library: made on request, looked at before it is loaded, and used only if it agrees with Python."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from graphcache.cli import main
from graphcache.errors import CompileError, ConfigError, CudaError
from graphcache.graphs import driver, native
from graphcache.graphs.native import build as room
from graphcache.graphs.native.__main__ import main as as_program
from graphcache.graphs.native.build import SOURCE, build, find, key
from graphcache.graphs.native.probe import disagreement
from graphcache.keys.native.compiled_library import NotUsable, compiler, folder, keep

PACKAGE = str(Path(native.__file__).parents[3])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GRAPHCACHE_NATIVE")
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)
    folder().mkdir(parents=True, mode=0o700)
    return folder()


@pytest.fixture
def library(home: Path, compiled: Any) -> Path:
    """The compiled library in it."""
    copy = home / "made.so"
    shutil.copy(compiled.__file__, copy)
    copy.chmod(0o700)
    return keep(copy, key())


def a_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Let ``CXX`` be a program that does something with its target, ``$out``."""
    script = home.parent / "compiler"
    script.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n{does}\n', encoding="utf-8"
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))


# ---- agreeing with Python


def test_the_library_agrees_with_python(compiled: Any) -> None:
    assert disagreement(compiled) is None
    said: list[str | None] = []

    def ask(value: torch.Tensor) -> torch.Tensor:
        said.append(disagreement(compiled))
        return value

    x = torch.ones(2)
    contexts = [torch.inference_mode(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode()]
    for context in contexts:
        with context:
            ask(x)
    torch.func.vmap(ask)(x)
    assert said == [None] * 5, "whatever the context it is first used in"


@pytest.mark.parametrize(
    ("lie", "about"),
    [
        ({"layout": lambda args: None}, "the layout of a torch.float32 tensor"),
        ({"layout": lambda args: (torch.is_inference_mode_enabled(), len(args))}, "the layout of a"),
        ({"address": lambda x: x.data_ptr() + 1}, "the address of a tensor"),
        ({"is_quiet": lambda: True}, "gradients"),
        ({"empty_like": lambda x: None}, "new memory like a"),
        ({"empty_like": lambda x: x}, "new memory like a"),
        ({"is_quiet": lambda: False}, "a context in which nothing is special"),
    ],
)
def test_a_library_that_lies_is_found_out(compiled: Any, lie: dict[str, Any], about: str) -> None:
    names = ("layout", "address", "empty_like", "is_quiet")
    said = disagreement(SimpleNamespace(**{name: getattr(compiled, name) for name in names} | lie))
    assert said is not None
    assert said.startswith(about)


@pytest.mark.parametrize("asked", ["several", "refused", "inference"])
def test_a_library_that_lies_about_some_layouts_is_found_out(compiled: Any, asked: str) -> None:
    def layout(args: Any) -> Any:
        if asked == "several" and len(args) == 2:
            return compiled.layout(tuple(args[:1]))
        if asked == "refused" and any(type(value) is torch.nn.Parameter for value in args):
            return (1,)
        found = compiled.layout(args)
        return found if asked != "inference" or found is None else (0, *found[1:])

    names = ("address", "empty_like", "is_quiet")
    said = disagreement(SimpleNamespace(layout=layout, **{name: getattr(compiled, name) for name in names}))
    wanted = {"several": "several tensors", "refused": "1 arguments of types ['Parameter']", "inference": "inference"}
    assert said is not None
    assert said.startswith(wanted[asked])


# ---- being found


def test_what_was_compiled_is_found_and_loaded(library: Path) -> None:
    assert find() == library
    found = native.loaded()
    assert found is not None
    assert found.layout((torch.ones(2),)) is not None


def test_it_is_not_used_where_it_is_not_wanted(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for no in ("0", "false", " False "):
        monkeypatch.setenv("GRAPHCACHE_NATIVE", no)
        assert native.loaded() is None
    for yes in ("1", "true", ""):
        monkeypatch.setenv("GRAPHCACHE_NATIVE", yes)
        assert native.loaded() is not None
    monkeypatch.setenv("GRAPHCACHE_NATIVE", "maybe")
    with pytest.raises(ConfigError, match=r"^GRAPHCACHE_NATIVE='maybe': expected 1, true, 0, false or nothing$"):
        native.loaded()


def silently(caplog: pytest.LogCaptureFixture) -> str:
    """What is said, once and for those who debug, of a library that is not used."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "graphcache"):
        assert native.loaded() is None
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage().startswith("hits are answered in Python: ")
    return record.getMessage()


def test_nothing_there(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "no compiled library for this torch and Python in" in silently(caplog)
    home.rmdir()
    assert "no compiled library" in silently(caplog)


def spoil(library: Path, how: str) -> None:
    note = library.with_name(f"{key()}.json")
    told = json.loads(note.read_text(encoding="utf-8"))
    data = library.read_bytes()
    if how == "cut short":
        library.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "empty":
        library.write_bytes(b"")
    elif how == "gone":
        library.unlink()
    elif how == "elsewhere":
        shutil.copy(library, library.parents[1] / library.name)
        note.write_text(json.dumps({**told, "file": f"../{library.name}"}), encoding="utf-8")
    elif how == "of another":
        other = library.with_name("other.so")
        other.write_bytes(b"\x7fELF" + bytes(2000))
        digest = hashlib.sha256(other.read_bytes()).hexdigest()
        note.write_text(json.dumps({"file": other.name, "sha256": digest}), encoding="utf-8")
    elif how == "writable by others":
        library.chmod(0o777)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "is not what was compiled"),
        ("changed", "is not what was compiled"),
        ("empty", "is not what was compiled"),
        ("gone", "does not describe a library (FileNotFoundError"),
        ("elsewhere", "which is elsewhere"),
        ("of another", "the compiled library raised ImportError"),
        ("writable by others", "may be written by others"),
    ],
)
def test_what_is_not_in_order_is_not_used(library: Path, caplog: pytest.LogCaptureFixture, how: str, said: str) -> None:
    spoil(library, how)
    assert said in silently(caplog)


def test_somebody_elses_is_not_used(
    library: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert f"belongs to user {os.getuid()}" in silently(caplog)


@given(note=st.one_of(st.binary(max_size=40), st.sampled_from([b"{}", b"[]", b"null", b'{"file": 1, "sha256": 2}'])))
def test_whatever_the_note_says(tmp_path_factory: pytest.TempPathFactory, note: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder().mkdir(parents=True)
        (folder() / f"{key()}.json").write_bytes(note)
        with pytest.raises(NotUsable):
            find()


def test_of_another_torch_or_source(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = key()
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    assert key() != before
    with pytest.raises(NotUsable):
        find()
    monkeypatch.undo()
    for changed in ("hit.cpp", "build.py", "answer.h"):
        other = tmp_path / changed
        shutil.copytree(SOURCE.parent, other)
        with monkeypatch.context() as patch:
            patch.setattr(room, "SOURCE", other / "hit.cpp")
            assert key() == before
            with open(other / changed, "ab") as file:
                file.write(b"\n")
            assert key() != before


# ---- being made


def test_what_is_there_is_not_made_again(library: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_compiler(home, monkeypatch, "exit 1")
    assert build() == library
    done = CliRunner().invoke(main, ["compile"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(library))
    assert as_program([]) == 0
    assert as_program([str(library)]) == 0


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo no such header >&2; exit 3", r"^the compiler failed \(exit code 3\): .*\nno such header$"),
        ("echo garbage > $out", r"^the library that was compiled is not sound \(exit code 1\): (.|\n)*ImportError"),
        ("rm $out", r"No such file|cannot"),
        ("kill -9 $$", r"^the compiler failed \(exit code -9\)"),
    ],
)
def test_a_compiler_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str) -> None:
    a_compiler(home, monkeypatch, does)
    with pytest.raises((CompileError, OSError), match=said):
        build()
    assert list(home.iterdir()) == [], "nothing is left"


def test_no_compiler_and_no_place(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(CompileError, match=r"^CXX='no-such-compiler -O3': there is no such program"):
        build()
    assert as_program([]) == 1
    assert "no-such-compiler" in capsys.readouterr().err
    done = CliRunner().invoke(main, ["compile"])
    assert done.exit_code == 1
    assert "no-such-compiler" in done.stderr
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(CompileError, match=r"^there is no C\+\+ compiler; install g\+\+ or clang\+\+"):
        compiler("C++")
    blocked = home.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(CompileError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        build()
    monkeypatch.setattr(room.os, "name", "nt")
    with pytest.raises(CompileError, match="for Linux"):
        build()


def test_several_processes_make_it_at_once(
    library: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prebuilt = tmp_path / "prebuilt"
    shutil.copy(library, prebuilt)
    shutil.rmtree(home)
    a_compiler(home, monkeypatch, f"cp {prebuilt} $out")
    command = [sys.executable, "-m", "graphcache.graphs.native"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PACKAGE})
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in running}
    assert said == {str(find())}
    assert sorted(path.suffix for path in home.iterdir()) == [".json", ".so"]


# ---- the driver's side


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {b"cuGraphLaunch": 0x10, b"cuMissing": 0}
    flags = SimpleNamespace(CU_GET_PROC_ADDRESS_LEGACY_STREAM=1)

    def get(symbol: bytes, version: int, flag: int) -> Any:
        assert (version, flag) == (12000, 1)
        return 0, known[symbol], 0

    fake = SimpleNamespace(cuGetProcAddress=get, CUdriverProcAddress_flags=flags)
    monkeypatch.setattr(driver, "binding", lambda: fake)
    assert driver.addresses("cuGraphLaunch", "cuGraphLaunch") == (0x10, 0x10)
    with pytest.raises(CudaError, match=r"^the driver has no function cuMissing; graphcache needs one for CUDA 12.0"):
        driver.addresses("cuGraphLaunch", "cuMissing")


def test_failures_by_number() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    assert str(driver.failure("cuGraphLaunch", 999)) == "cuGraphLaunch failed with CUDA_ERROR_UNKNOWN (999)"
    assert str(driver.failure("cuGraphLaunch", 123456)).startswith("cuGraphLaunch failed with")
    assert real.CUresult(999).name == "CUDA_ERROR_UNKNOWN"
