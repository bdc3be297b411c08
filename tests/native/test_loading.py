"""Native code comes in the background, or one message says why it does not."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import graphcache
from graphcache import native
from graphcache.cli import main
from graphcache.errors import CompileError, ConfigError
from graphcache.native import recipe
from graphcache.native.compiler import NotUsable, build, find, folder, key, packaged
from graphcache.native.probe import Disagreement

PACKAGE = str(Path(graphcache.__file__).parents[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user's, and a process that has asked for no guard yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GRAPHCACHE_NATIVE")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "_loader", native._Loader())
    return tmp_path


@pytest.fixture
def library(compiled: Any) -> Any:
    return compiled


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
    """The one message of a library that cannot be had."""
    with caplog.at_level(logging.DEBUG, "graphcache"):
        for wait in (True, False, True):
            assert native.loaded(wait) is None
    (record,) = caplog.records
    assert record.levelno == level
    assert native.status() in record.getMessage()
    assert record.getMessage().startswith("hits take longer, since there is no native code: ")
    return record.getMessage()


@pytest.fixture(autouse=True)
def guards_in_native_code() -> None:
    """Not those of the tests' own library."""


def test_it_is_compiled_and_then_found(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt(home, library, monkeypatch)
    assert native.status() == "not used so far"
    found = native.loaded(wait=True)
    assert found is not None
    assert found.Guard().holds()
    assert native.guard_type() is found.Guard
    assert type(native.new_lock()) is found.Lock
    assert native.loaded() is found
    assert native.status() == "active"
    assert find().parent == folder()
    assert [path.suffix for path in folder().iterdir()] == [".so"]
    a_compiler(home, monkeypatch, "exit 1")
    monkeypatch.setattr(native, "_loader", native._Loader())
    assert native.loaded(wait=True) is not None, "there is one already"


def test_the_caller_does_not_wait(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(home / "gate")
    a_compiler(home, monkeypatch, f'read go < "{home}/gate"; cp "{library.__file__}" "$out"')
    monkeypatch.setattr(native, "_MOMENT", 0.001)
    assert native.loaded() is None
    assert native.loaded() is None
    assert native.is_pending()
    assert native.status() == "being compiled"
    (home / "gate").write_text("go\n")
    assert native.loaded(wait=True) is not None


def test_it_can_be_turned_off(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    a_compiler(home, monkeypatch, f'touch "{home}/called"; exit 1')
    for no in ("0", "false"):
        monkeypatch.setenv("GRAPHCACHE_NATIVE", no)
        assert native.loaded(wait=True) is None
        assert not native.is_pending()
        assert native.status() == "GRAPHCACHE_NATIVE=0"
    monkeypatch.setenv("GRAPHCACHE_NATIVE", "perhaps")
    with pytest.raises(ConfigError, match="GRAPHCACHE_NATIVE='perhaps'"):
        native.loaded()
    assert caplog.records == []
    assert not (home / "called").exists()


def test_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert "there is no C compiler; install gcc or clang, or name one in CC" in said(caplog)


def test_no_headers(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    paths = sysconfig.get_paths()
    monkeypatch.setattr(recipe.sysconfig, "get_paths", lambda: {**paths, "include": str(home)})
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


def test_a_library_that_disagrees(
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
        patch.setattr(recipe.sys, name, value)
        with pytest.raises(NotUsable, match="is for Linux"):
            build()
    monkeypatch.setattr(recipe, "unsupported", lambda: "not for this system")
    assert "not for this system" in said(caplog, logging.INFO)


def test_a_free_threaded_python_has_none(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = recipe.command(home / "library.so")
    done = subprocess.run([*command, "-DPy_GIL_DISABLED=1"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "not for free-threaded Python" in done.stderr
    monkeypatch.setattr(recipe.sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"))
    with pytest.raises(NotUsable, match="for CPython with its global lock"):
        build()


def test_a_subinterpreter_has_none(library: Any) -> None:
    """What is static in the library belongs to the main interpreter, which may use it meanwhile."""
    load = f"""
from importlib.machinery import ExtensionFileLoader, ModuleSpec
try:
    loader = ExtensionFileLoader("_graphcache", {library.__file__!r})
    module = loader.create_module(ModuleSpec("_graphcache", loader, origin={library.__file__!r}))
    module.configure()
except (ImportError, TypeError) as error:
    print(type(error).__name__, error, flush=True)
"""
    done = as_program(f"""
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
exec({load!r})
interpreters.run_string(interpreters.create(), {load!r})
""")
    assert done.returncode == 0, done.stderr
    here, there = done.stdout.splitlines()
    assert here.startswith("TypeError")
    assert there.startswith("ImportError")
    assert "interpreter" in there


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
        find()
    assert build() == path
    assert find() == path
    folder().chmod(0o777)
    with pytest.raises(CompileError, match=r"will not be loaded: .* may be written by others"):
        build()


def test_the_key(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    copy = tmp_path / "copy"
    shutil.copytree(recipe.SOURCE.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recipe, "SOURCE", copy / "library.c")
    assert key() == before
    for name in ("library.c", "tensors.h", "recipe.py"):
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
    done = as_program("from graphcache import native; native._EXIT = 0.01; print(native.loaded())")
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
from graphcache import native
warnings.simplefilter("ignore")
native._EXIT = 60.0
assert native.loaded() is None
while not os.path.exists({str(home / "first")!r}):
    os.sched_yield()
child = os.fork()
if child == 0:
    os.environ["XDG_CACHE_HOME"] = {str(home / "child")!r}
    found = native.loaded(wait=True)
    os._exit(0 if found is not None and found.Guard().holds() else 1)
print(os.waitpid(child, 0)[1])
Path({str(home / "gate")!r}).write_text("go\\n")
"""
    done = as_program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert find().exists()


def test_the_real_compiler(home: Path, library: Any) -> None:
    """The fixture has compiled it without a word; here its warnings count as well."""
    command = recipe.command(home / "library.so")
    done = subprocess.run([*command, "-Wall", "-Werror"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- being found


@pytest.fixture
def kept(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in the cache."""
    prebuilt(home, library, monkeypatch)
    return build()


def test_nothing_there(home: Path) -> None:
    with pytest.raises(NotUsable, match="no compiled library for this Python in"):
        find()


def spoil(library: Path, how: str) -> None:
    data = library.read_bytes()
    if how == "cut short":
        library.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "empty":
        library.write_bytes(b"")
    elif how == "gone":
        library.unlink()
    elif how == "of another Python":
        library.rename(library.with_name(f"0{library.name}"))
    elif how == "writable by others":
        library.chmod(0o777)
    elif how == "a folder":
        library.unlink()
        library.mkdir()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", "is not what was compiled"),
        ("changed", "is not what was compiled"),
        ("empty", "is not what was compiled"),
        ("gone", "no compiled library for this Python in"),
        ("of another Python", "no compiled library for this Python in"),
        ("writable by others", "may be written by others"),
        ("a folder", "Is a directory"),
    ],
)
def test_what_is_not_in_order_is_not_used(kept: Path, how: str, said: str) -> None:
    spoil(kept, how)
    with pytest.raises(NotUsable, match=re.escape(said)):
        find()


def test_one_in_order_is_found_among_others(kept: Path) -> None:
    kept.with_name(f"{key()}-{'0' * 64}.so").write_bytes(b"")
    kept.with_name(f"{key()}-{'f' * 64}.so").write_bytes(b"")
    assert find() == kept


def test_somebody_elses_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NotUsable, match=f"belongs to user {os.getuid()}"):
        find()


# ---- in the wheel


@pytest.fixture
def installed(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources as a wheel installs them, with the library beside them, where there is no compiler."""
    copy = home / "copy"
    shutil.copytree(recipe.SOURCE.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recipe, "SOURCE", copy / "library.c")
    monkeypatch.setenv("CC", "no-such-compiler")
    return Path(shutil.copy(library.__file__, packaged()))


def test_that_of_the_wheel_is_loaded(installed: Path) -> None:
    found = native.loaded(wait=True)
    assert found is not None
    assert found.__file__ == str(installed)
    assert native.compile_now() == installed
    assert not folder().exists()


@pytest.mark.parametrize("how", ["another source", "another Python", "newer system libraries"])
def test_that_of_the_wheel_does_not_fit(
    installed: Path, home: Path, library: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Then there is one of this machine's own."""
    if how == "another source":
        (installed.parent / "more.h").write_text("")
    elif how == "another Python":
        installed.rename(installed.with_name("0" * 16 + ".so"))
    else:
        installed.write_bytes(b"no library that this system can load")
    prebuilt(home, library, monkeypatch)
    assert native.loaded(wait=True) is not None
    assert native.compile_now() == find()


# ---- the command


def test_the_command_says_where_it_is(kept: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_compiler(home, monkeypatch, "exit 1")
    done = CliRunner().invoke(main, ["compile"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(kept))


def test_the_command_says_why_not(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    done = CliRunner().invoke(main, ["compile"])
    assert done.exit_code == 1
    assert "CC='no-such-compiler -O3': there is no such program" in done.stderr
    prebuilt(home, library, monkeypatch)

    def disagrees(library: Any) -> None:
        raise Disagreement("the address of a tensor")

    with monkeypatch.context() as patch, pytest.raises(CompileError, match=r"is not used \(Disagreement: the address"):
        patch.setattr(native, "prepare", disagrees)
        native.compile_now()
    monkeypatch.setattr(recipe.sys, "platform", "darwin")
    with pytest.raises(CompileError, match="for Linux"):
        native.compile_now()


@pytest.mark.parametrize("does", ["exit 3", 'rm "$out"', "kill -9 $$"])
def test_nothing_is_left_of_what_failed(home: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    a_compiler(home, monkeypatch, does)
    with pytest.raises((CompileError, OSError)):
        build()
    assert list(folder().iterdir()) == []


def test_several_processes_make_it_at_once(home: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt(home, library, monkeypatch)
    command = [sys.executable, "-m", "graphcache", "compile"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PACKAGE})
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in running}
    assert said == {str(find())}
    assert [path.suffix for path in folder().iterdir()] == [".so"]
