"""What is optional is named with the extra that installs it, and the extras are those of the package."""

import sys
import tomllib
from pathlib import Path

import pytest

import graphcache
from graphcache.errors import ExtraNotFoundError, GraphCacheError
from graphcache.extras import EXTRAS, optional

PROJECT = tomllib.loads((Path(graphcache.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
OPTIONAL = PROJECT["optional-dependencies"]


def test_what_is_there_is_imported():
    assert optional("json.decoder", "a test") is sys.modules["json.decoder"]


@pytest.mark.parametrize(("extra", "modules"), EXTRAS.items())
def test_what_is_not_there_is_named_with_its_extra(monkeypatch, extra, modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ExtraNotFoundError) as raised:
            optional(module, "this test")
        assert str(raised.value).startswith(f"this test needs {module} (")
        assert str(raised.value).endswith(f'; pip install "graphcache[{extra}]"')
        assert raised.value.name == module
        assert isinstance(raised.value, (GraphCacheError, ModuleNotFoundError))


def test_other_packages_are_named_by_themselves():
    with pytest.raises(ExtraNotFoundError, match=r"pip install no_such_package$"):
        optional("no_such_package.part", "this test")


def test_each_extra_is_one_of_the_project():
    assert set(EXTRAS) <= set(OPTIONAL)
    for extra, modules in EXTRAS.items():
        named = " ".join(OPTIONAL[extra]).replace("-", "_")
        assert all(module in named for module in modules)


def test_the_tests_are_installed_with_what_they_need():
    [combined] = [each for each in OPTIONAL["test"] if each.startswith("graphcache[")]
    assert combined == "graphcache[metrics,nvtx,plots,ray,tensors]"
