"""The tests that drive native code find nothing under GCC's sanitizers: memory, undefined behaviour, threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ["tests/keys/test_native_objects.py", "tests/keys/test_native_guard.py", "tests/keys/test_native_tensors.py"]
HITS = ["tests/dispatch/test_fast_path.py", "tests/dispatch/test_native_guards.py", "tests/graphs/test_executables.py"]
THREADS = ["tests/dispatch/test_native_threads.py", "tests/dispatch/test_native_entry.py", "tests/graphs/test_lock.py"]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or None in map(shutil.which, ("gcc", "setarch")),
        reason="needs gcc on Linux",
    ),
]


def runtime(name: str) -> str:
    """The library that has to be loaded before a sanitized one."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"gcc has no {name}")
    return path


@pytest.mark.parametrize(
    ("sanitizers", "libraries", "symbol", "tests"),
    [
        ("address,undefined", ["libasan.so", "libubsan.so"], b"__asan_", [*OBJECTS, *HITS, *THREADS]),
        ("thread", ["libtsan.so"], b"__tsan_", [*THREADS, "tests/dispatch/test_native_guards.py"]),
    ],
)
def test_nothing_is_found(
    tmp_path: Path, sanitizers: str, libraries: list[str], symbol: bytes, tests: list[str]
) -> None:
    """Python and torch are not sanitized: what they do wrong is not looked for, and what they keep is no leak."""
    environment = {
        **os.environ,
        "CC": f"gcc -fsanitize={sanitizers} -fno-sanitize-recover=undefined -g",
        "LD_PRELOAD": " ".join(map(runtime, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "GRAPHCACHE_TEST_CACHE": str(tmp_path),
    }
    # Sanitizers need memory at places that a random layout may take.
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (library,) = (tmp_path / "graphcache" / "native").glob("*.so")
    assert symbol in library.read_bytes(), "it was the sanitized library"
