import os

import pytest

from bench import cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to cores here")


def test_the_fastest_core_is_taken_and_given_back():
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("there is one core")
    wanted, asked = max(before), []

    def work():
        (core,) = os.sched_getaffinity(0)
        asked.append(core)
        return 1 if core == wanted else 2

    with pytest.raises(RuntimeError), cores.quietest(work) as core:
        assert core == wanted
        assert os.sched_getaffinity(0) == {wanted}
        raise RuntimeError
    assert os.sched_getaffinity(0) == before
    assert set(asked) == before


def test_a_failure_while_looking_gives_them_back():
    before = os.sched_getaffinity(0)

    def work():
        raise RuntimeError

    if len(before) > 1:
        with pytest.raises(RuntimeError), cores.quietest(work):
            pass
    assert os.sched_getaffinity(0) == before


def test_without_a_choice_nothing_happens(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("there is no choice"))
    with cores.quietest() as core:
        assert core is None


def test_work_takes_time():
    assert cores.spin() > 0
