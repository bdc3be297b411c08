from __future__ import annotations

import inspect

import pytest

from graphcache import errors
from graphcache.errors import Cause, GraphCacheError, Reason, Refusal

TREE = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, GraphCacheError)]


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (errors.ConfigError, ValueError),
        (errors.InputError, ValueError),
        (errors.InputCountError, TypeError),
        (errors.InputTypeError, TypeError),
        (errors.InputDtypeError, TypeError),
        (errors.ProfileRangeError, errors.InputError),
        (errors.EngineFormatError, ValueError),
        (errors.EngineVersionError, errors.EngineError),
        (errors.EngineError, RuntimeError),
        (errors.CaptureError, RuntimeError),
        (errors.ModeConflictError, RuntimeError),
        (errors.ClosedError, RuntimeError),
        (errors.NoGpuError, RuntimeError),
        (errors.CudaError, RuntimeError),
        (errors.TensorRTNotFoundError, ModuleNotFoundError),
    ],
)
def test_an_error_is_caught_by_the_builtin_that_a_caller_would_name(raised, caught):
    with pytest.raises(caught):
        raise raised("what happened")


@pytest.mark.parametrize("error", TREE, ids=lambda each: each.__name__)
def test_every_error_is_a_graphcache_error_and_says_when_it_is_raised(error):
    assert issubclass(error, GraphCacheError)
    assert error.__doc__.endswith(".")


@pytest.mark.parametrize("reason", Reason, ids=lambda each: each.name)
def test_a_reason_has_a_name_a_sentence_and_a_remedy_that_make_one_line(reason):
    assert reason.value == reason.name.lower()
    line = str(Cause(reason))
    assert line == f"{reason.value}: {reason.sentence}. To change that: {reason.remedy}."
    assert "\n" not in line
    assert ".." not in line


def test_reasons_are_told_apart_by_their_sentences_too():
    assert len({reason.sentence for reason in Reason}) == len(Reason)


def test_a_reason_is_found_by_its_value():
    assert Reason("grad") is Reason.GRAD


def test_a_cause_says_where_and_what_was_seen_without_doubling_the_full_stop():
    text = str(Cause(Reason.RANDOM, "head.dropout", "p=0.5."))
    assert "(at head.dropout): p=0.5. To change that:" in text


def test_causes_are_equal_if_they_say_the_same():
    assert Cause(Reason.GRAD, "a") == Cause(Reason.GRAD, "a")
    assert len({Cause(Reason.GRAD, "a"), Cause(Reason.GRAD, "a"), Cause(Reason.GRAD, "b")}) == 2


def test_a_refusal_carries_its_cause_and_is_not_an_error_of_the_public_tree():
    refusal = Refusal(Reason.MUTATES, "args[0]", "add_")
    assert refusal.cause == Cause(Reason.MUTATES, "args[0]", "add_")
    assert str(refusal) == str(refusal.cause)
    assert not isinstance(refusal, GraphCacheError)
