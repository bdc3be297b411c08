"""The compiled guard comes in the background, or one message says why it does not."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import graphcache
from graphcache.errors import CompileError, ConfigError
from graphcache.keys import native
from graphcache.keys.native import compiler as building
from graphcache.keys.native.compiled_library import NotUsable, find, folder
from graphcache.keys.native.compiler import build, key

PACKAGE = str(Path(graphcache.__file__).parents[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user's, and a process that has asked for no guard yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GRAPHCACHE_NATIVE")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "_loader", native._Loader())
    return tmp_path


def a_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Let ``CC`` be a program that does something with its target, ``$out``."""
    script = home / "compiler"
    script.write_text(f'#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n{does}\n', "utf-8")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))


def prebuilt(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler give what was compiled before, to save time."""
    a_compiler(home, monkeypatch, f'cp "{library.__file__}" "$out"')


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> str:
    """The one message of a guard that cannot be had."""
    with caplog.at_level(logging.DEBUG, "graphcache"):
        for wait in (True, False, True):
            assert native.guard_type(wait) is None
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage().startswith("guards are compared in Python, which is slower, since there is no compiled")
    return record.getMessage()


def test_it_is_compiled_and_then_found(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt(home, library, monkeypatch)
    guard = native.guard_type(wait=True)
    assert guard is not None
    assert guard().holds()
    assert native.guard_type() is guard
    assert find(key()).parent == folder()
    assert sorted(path.suffix for path in folder().iterdir()) == [".json", ".so"]
    a_compiler(home, monkeypatch, "exit 1")
    monkeypatch.setattr(native, "_loader", native._Loader())
    assert native.guard_type(wait=True) is not None, "there is one already"


def test_the_caller_does_not_wait(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(home / "gate")
    a_compiler(home, monkeypatch, f'read go < "{home}/gate"; cp "{library.__file__}" "$out"')
    monkeypatch.setattr(native, "_MOMENT", 0.001)
    assert native.guard_type() is None
    assert native.guard_type() is None
    (home / "gate").write_text("go\n")
    assert native.guard_type(wait=True) is not None


def test_it_can_be_turned_off(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    a_compiler(home, monkeypatch, f'touch "{home}/called"; exit 1')
    for no in ("0", "false"):
        monkeypatch.setenv("GRAPHCACHE_NATIVE", no)
        assert native.guard_type(wait=True) is None
    monkeypatch.setenv("GRAPHCACHE_NATIVE", "perhaps")
    with pytest.raises(ConfigError, match="GRAPHCACHE_NATIVE='perhaps'"):
        native.guard_type()
    assert caplog.records == []
    assert not (home / "called").exists()


def test_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert "there is no C compiler; install gcc or clang, or name one in CC" in said(caplog)


def test_no_headers(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    paths = sysconfig.get_paths()
    monkeypatch.setattr(building.sysconfig, "get_paths", lambda: {**paths, "include": str(home)})
    assert f"{home} has no Python.h; install Python's headers" in said(caplog)


def test_no_place(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert "cannot be written" in said(caplog)


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("echo wrong header >&2; exit 3", r"the compiler failed (exit code 3)"),
        ('echo garbage > "$out"', "ImportError"),
        ('rm "$out"', "FileNotFoundError"),
    ],
)
def test_a_compiler_that_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, does: str, why: str
) -> None:
    a_compiler(home, monkeypatch, does)
    assert why in said(caplog)


def test_a_guard_that_disagrees(
    home: Path, library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prebuilt(home, library, monkeypatch)

    def disagrees(library: Any) -> None:
        raise RuntimeError("the place of the data of a tensor is unknown")

    monkeypatch.setattr(native, "prepare", disagrees)
    assert "RuntimeError: the place of the data of a tensor is unknown" in said(caplog)


@pytest.mark.parametrize(("name", "value"), [("platform", "darwin"), ("byteorder", "big"), ("maxsize", 2**31 - 1)])
def test_systems_without(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building.sys, name, value)
        with pytest.raises(NotUsable, match="is for Linux"):
            build()
    monkeypatch.setattr(native, "build", lambda: (_ for _ in ()).throw(NotUsable("not for this system")))
    assert "not for this system" in said(caplog, logging.INFO)


def test_no_thread(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(native.threading.Thread, "start", refuse)
    assert "RuntimeError: can't start new thread" in said(caplog)


def test_what_others_may_write_is_compiled_again(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt(home, library, monkeypatch)
    path = build()
    path.chmod(0o777)
    with pytest.raises(NotUsable, match="may be written by others"):
        find(key())
    assert build() == path
    assert find(key()) == path
    folder().chmod(0o777)
    with pytest.raises(CompileError, match=r"will not be loaded: .* may be written by others"):
        build()


def test_the_key(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    copy = tmp_path / "copy"
    shutil.copytree(building.SOURCE.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(building, "SOURCE", copy / "guard.c")
    assert key() == before
    for name in ("guard.c", "tensors.h", "compiler.py"):
        text = (copy / name).read_bytes()
        (copy / name).write_bytes(text + b"\n")
        assert key() != before
        (copy / name).write_bytes(text)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: "cpython-399")
    assert key() != before


def as_program(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which prints nothing but what it means to."""
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_the_process_may_end_meanwhile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(home / "gate")
    a_compiler(home, monkeypatch, f'read go < "{home}/gate"; exit 1')
    done = as_program("from graphcache.keys import native; native._EXIT = 0.01; print(native.guard_type())")
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    (home / "gate").write_text("go\n")


def test_a_fork_meanwhile_and_a_short_program(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child compiles for itself; the parent ends at once and leaves its library all the same."""
    os.mkfifo(home / "gate")
    only_the_first_waits = f'mkdir "{home}/first" 2>/dev/null && read go < "{home}/gate"'
    a_compiler(home, monkeypatch, f'{only_the_first_waits}; cp "{library.__file__}" "$out"')
    code = f"""
import os, warnings
from pathlib import Path
from graphcache.keys import native
warnings.simplefilter("ignore")
native._EXIT = 60.0
assert native.guard_type() is None
while not os.path.exists({str(home / "first")!r}):
    os.sched_yield()
child = os.fork()
if child == 0:
    os.environ["XDG_CACHE_HOME"] = {str(home / "child")!r}
    guard = native.guard_type(wait=True)
    os._exit(0 if guard is not None and guard().holds() else 1)
print(os.waitpid(child, 0)[1])
Path({str(home / "gate")!r}).write_text("go\\n")
"""
    done = as_program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert find(key()).exists()


def test_the_real_compiler(home: Path, library: Any) -> None:
    """The fixture has compiled it without a word; here its warnings count as well."""
    command = building.command(home / "guard.so")
    done = subprocess.run([*command, "-Wall", "-Werror"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
