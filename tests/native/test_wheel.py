"""A wheel has native code for the Python that built it, where a compiler is; otherwise it is pure. Both work."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import graphcache
from graphcache.native.recipe import NotCompiled, command, key, unsupported

ROOT = Path(graphcache.__file__).parents[1]
pytest.importorskip("hatchling", reason="hatchling builds the wheels")

USE = """
import logging, torch, graphcache
from graphcache import native
logging.basicConfig(format="%(message)s")
fast = graphcache.wrap(torch.nn.Linear(2, 2).requires_grad_(False).eval())
for _ in range(5):
    fast(torch.ones(1, 2))
native.loaded(wait=True)
print(graphcache.__file__)
print(fast.cache_info().hits > 0, native.status())
"""


def build(kind: str, target: Path, root: Path = ROOT, **environment: str) -> Path:
    """What hatchling builds, as pip and ``python -m build`` have it do."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def use(wheel: Path, home: Path) -> tuple[str, str]:
    """Unpack a wheel, which is what installing is, and use it with no compiler; what it prints and says."""
    site = home / "site"
    zipfile.ZipFile(wheel).extractall(site)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GRAPHCACHE_")}
    others = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    variables |= {"PATH": str(home), "CC": "", "XDG_CACHE_HOME": str(home / "cache")}
    variables["PYTHONPATH"] = os.pathsep.join([str(site), *others])
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=home, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.splitlines()
    assert where == str(site / "graphcache" / "__init__.py")
    return said, done.stderr


def can_compile() -> bool:
    try:
        command(Path("library.so"))
    except NotCompiled:
        return False
    return not unsupported()


@pytest.mark.skipif(not can_compile(), reason="there is no C compiler")
def test_a_wheel_with_native_code_needs_no_compiler(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path / "wheel")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"graphcache-{graphcache.__version__}-{version}-{version}-{platform}.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == [f"graphcache/native/{key()}.so"]
    assert use(wheel, tmp_path) == ("True active", "")
    assert not (tmp_path / "cache").exists(), "nothing was compiled"
    assert not any((ROOT / "graphcache" / "native").glob("*.so")), "nothing is left in the source"


def test_a_wheel_that_was_built_without_a_compiler_is_pure_and_says_once_what_is_missing(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path / "wheel", CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    said, messages = use(wheel, tmp_path)
    missing = "there is no C compiler; install gcc or clang, or name one in CC"
    assert said == f"True CompileError: {missing}"
    assert messages == f"hits take longer, since there is no native code: CompileError: {missing}\n"


@pytest.mark.full
def test_the_source_distribution_builds_the_same_wheel(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    again, here = build("wheel", tmp_path / "again", root), build("wheel", tmp_path / "here")
    assert again.name == here.name
    assert {*zipfile.ZipFile(again).namelist()} == {*zipfile.ZipFile(here).namelist()}
