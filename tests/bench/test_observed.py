"""What observing costs: the figures are there, and are of hits alone."""

import json

import pytest

from bench import observed

pytest.importorskip("prometheus_client")
pytest.importorskip("nvtx")


def test_every_module_is_measured_and_written(tmp_path, capsys):
    assert observed.main(["--rounds", "40", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "observed.json").read_text())
    names = ["bare", "observed", "ranges around every call"]
    assert list(found["results"]) == names
    assert found["over_bare"]["bare"] == 1.0
    assert all(found["results"][name]["n"] == 40 for name in names)
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_a_wrong_answer_is_not_measured(monkeypatch):
    monkeypatch.setattr(observed.torch, "equal", lambda one, other: False)
    with pytest.raises(AssertionError):
        observed.measure(1)


def test_anything_but_a_hit_is_not_measured(monkeypatch):
    interleave = observed.record.interleave

    def emptied(systems, calls):
        def cleared(call):
            module = call.__closure__[0].cell_contents
            return lambda: (module.clear(), call())

        return interleave({name: cleared(call) for name, call in systems.items()}, calls=calls)

    monkeypatch.setattr(observed.record, "interleave", emptied)
    with pytest.raises(AssertionError):
        observed.measure(2)
