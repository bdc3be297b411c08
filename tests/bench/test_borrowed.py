import sys
from types import ModuleType

import pytest

from bench.peers import borrowed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``heavy.deep.part``, where both packages raise when they are imported; forgotten afterwards."""
    deep = tmp_path / "heavy_peer" / "deep"
    deep.mkdir(parents=True)
    for folder in (deep.parent, deep):
        (folder / "__init__.py").write_text("raise ImportError('a dozen packages that are not here')")
    (deep / "part.py").write_text(
        "import tensorrt\nfrom heavy_peer.deep import other\nNAME = tensorrt.NAME + other.TAIL"
    )
    (deep / "other.py").write_text("TAIL = '!'")
    monkeypatch.syspath_prepend(tmp_path)
    yield "heavy_peer"
    for name in [each for each in sys.modules if each.startswith("heavy_peer")]:
        del sys.modules[name]


@pytest.fixture
def flavour():
    made = ModuleType("tensorrt_other")
    made.NAME = "other"
    return made


def test_a_part_is_imported_without_its_packages(package, flavour):
    with borrowed.as_tensorrt(flavour):
        part = borrowed.without_init(f"{package}.deep.part", package, f"{package}.deep")
    assert part.NAME == "other!"
    assert sys.modules[package].deep.part is part


def test_twice_is_the_same_part(package, flavour):
    with borrowed.as_tensorrt(flavour):
        first = borrowed.without_init(f"{package}.deep.part", package, f"{package}.deep")
        assert borrowed.without_init(f"{package}.deep.part", package, f"{package}.deep") is first


def test_an_init_that_is_not_left_out_runs(package):
    with pytest.raises(ImportError, match="a dozen packages"):
        borrowed.without_init(f"{package}.deep.part", package)


def test_what_is_not_there_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="surely_missing"):
        borrowed.without_init("surely_missing.part", "surely_missing")
    assert "surely_missing" not in sys.modules


def test_a_plain_module_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "plain_peer.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="plain_peer"):
        borrowed.without_init("plain_peer.part", "plain_peer")


@pytest.mark.parametrize("before", [None, ModuleType("tensorrt")])
def test_tensorrt_is_another_only_inside(flavour, monkeypatch, before):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    if before is not None:
        monkeypatch.setitem(sys.modules, "tensorrt", before)

    def look():
        import tensorrt

        return tensorrt

    with pytest.raises(RuntimeError, match="inside"), borrowed.as_tensorrt(flavour):
        assert look() is flavour
        raise RuntimeError("inside")
    assert sys.modules.get("tensorrt") is before


def test_stand_ins_are_for_what_is_missing_and_only_inside():
    import json

    with borrowed.stand_in("surely_missing", "surely_missing.driver", "json"):
        import surely_missing.driver as driver

        assert sys.modules["surely_missing"].driver is driver
        assert sys.modules["json"] is json
    assert "surely_missing" not in sys.modules
    assert "surely_missing.driver" not in sys.modules


def test_only_what_is_missing_is_named():
    assert borrowed.not_installed("json") is None
    assert borrowed.not_installed("json", "surely_missing", "no_parent.child") == (
        "not installed: surely_missing, no_parent.child"
    )
