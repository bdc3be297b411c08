"""Functions that make modules, named by text."""

import sys

import pytest
from torch import nn

from graphcache.errors import ConfigError
from graphcache.serving.factories import is_factory, named_object, raised


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nets.py:mlp", True),
        ("package.nets:mlp", True),
        ("package.nets:Nets.mlp", True),
        ("model.engine", False),
        ("C:/models/a b", False),
        ("nets.py:", False),
        (None, False),
        (7, False),
        (b"nets.py:mlp", False),
    ],
)
def test_what_is_taken_for_a_function(text, wanted):
    assert is_factory(text) is wanted


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py:mlp").touch()
    assert not is_factory("nets.py:mlp")


def test_a_function_of_a_file_and_of_a_package_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_nets_here.py").write_text("from torch import nn\nclass Nets:\n    mlp = nn.ReLU\n")
    path = list(sys.path)
    try:
        for text in (
            "some_nets_here.py:Nets.mlp",
            "some_nets_here:Nets.mlp",
            str(tmp_path / "some_nets_here.py:Nets.mlp"),
        ):
            assert named_object(text) is nn.ReLU
    finally:
        sys.modules.pop("some_nets_here", None)
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.py:mlp", r"^there is no file nothing\.py; expected the path of a Python file$"),
        ("no_such_package_here:mlp", r"^no_such_package_here cannot be imported: ModuleNotFoundError: No module named"),
        ("torch.nn:Nothing", r"^torch\.nn has no 'Nothing'; expected a function that returns an nn\.Module$"),
        ("torch.nn:ReLU.nothing", r"^torch\.nn has no 'ReLU\.nothing'"),
        (
            "broken_here.py:mlp",
            r"^broken_here\.py cannot be imported: ValueError: of two lines \(.*broken_here\.py:1\)$",
        ),
    ],
)
def test_what_is_wrong_is_said(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_here.py").write_text("raise ValueError('of two\\nlines')\n")
    path = list(sys.path)
    try:
        with pytest.raises(ConfigError, match=message):
            named_object(text)
    finally:
        sys.modules.pop("broken_here", None)
    assert sys.path == path


def test_an_exception_without_a_traceback():
    assert raised(ValueError("a\nb")) == "ValueError: a b"
