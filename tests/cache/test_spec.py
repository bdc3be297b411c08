from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.keys.call_key import describe
from graphcache.cache.spec import MOST_TEXT, Spec, example_of, spec_of
from graphcache.cache.tree import TreeError
from graphcache.errors import Reason, Refusal
from tests.helpers import constants, structures, tensors

arguments = st.lists(structures(constants | tensors()), max_size=3).map(tuple)


@given(arguments, st.dictionaries(st.text(max_size=3), structures(constants | tensors()), max_size=2))
def test_an_example_has_the_signature_and_the_spec_of_the_call(args, kwargs):
    spec = spec_of(args, kwargs)
    new_args, new_kwargs = example_of(spec, "cpu")
    assert describe(new_args, new_kwargs)[0] == describe(args, kwargs)[0]
    assert spec_of(new_args, new_kwargs) == spec


@given(arguments, arguments)
def test_two_calls_have_one_spec_where_they_have_one_signature(left, right):
    assert (spec_of(left, {}) == spec_of(right, {})) == (describe(left, {})[0] == describe(right, {})[0])


@given(arguments)
def test_a_spec_is_the_same_after_a_file(args):
    spec = spec_of(args, {})
    again = Spec.of_tree(json.loads(json.dumps(spec.tree)))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.nbytes == spec.nbytes


@given(arguments)
def test_its_bytes_are_those_of_the_example(args):
    spec = spec_of(args, {})
    found = describe(example_of(spec, "cpu")[0], {})[1]
    assert spec.nbytes == sum({id(each): each.untyped_storage().nbytes() for each in found}.values())


def test_an_example_holds_zeros_that_can_be_indices():
    ((ids, x), kwargs) = example_of(spec_of((torch.ones(3, dtype=torch.int64), torch.ones(2)), {"y": -0.0}), "cpu")
    assert (ids.tolist(), x.tolist(), str(kwargs["y"])) == ([0, 0, 0], [0, 0], "-0.0")
    with torch.inference_mode():
        ((inside,), _) = example_of(spec_of((torch.ones(1),), {}), "cpu")
    assert not inside.is_inference()
    assert not inside.requires_grad


def test_an_example_lies_on_the_device_but_for_what_lay_on_the_host():
    args = (torch.zeros(2, device="meta"), torch.zeros(3), [torch.zeros(1, device="meta")])
    (first, second, [third]), _ = example_of(spec_of(args, {}), "meta")
    assert [each.device.type for each in (first, second, third)] == ["meta", "cpu", "meta"]
    ((alone,), _) = example_of(spec_of((torch.zeros(3),), {}), "meta")
    assert alone.device.type == "meta"


def contexts() -> list[Any]:
    return [
        torch.enable_grad(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", torch.float16),
    ]


@pytest.mark.parametrize("recorded", range(5))
@pytest.mark.parametrize("current", range(5))
def test_the_modes_of_the_call_are_back_wherever_it_is_made_again(recorded, current):
    args = (torch.zeros(2),)
    with contexts()[recorded]:
        spec, signature = spec_of(args, {}), describe(args, {})[0]
    with contexts()[current]:
        before = describe(args, {})[0]
        with spec.modes():
            assert describe(args, {})[0] == signature
            assert spec_of(args, {}) == spec
        assert describe(args, {})[0] == before


def test_five_modes_are_five_specs():
    specs = set()
    for context in contexts():
        with context:
            specs.add(spec_of((torch.zeros(2),), {}))
    assert len(specs) == 5


def test_autocast_for_a_device_that_is_not_there_is_left_out():
    spec = spec_of((), {})
    tree = spec.tree
    tree["modes"]["autocast"] = {"cuda": "float16"}
    with Spec.of_tree(tree).modes():
        assert torch.is_autocast_enabled("cuda") == torch.cuda.is_available()


def test_what_cannot_be_told_says_where():
    with pytest.raises(Refusal, match=r"\(at args\[1\]\): an object of type builtins.object") as refused:
        spec_of((1, object()), {})
    assert refused.value.cause.reason is Reason.ARGUMENT
    with pytest.raises(Refusal, match=r"\(at kwargs\['k'\]\): an object of type builtins.set"):
        spec_of((), {"k": {1}})
    with pytest.raises(Refusal, match=rf"\d+ characters as text, of which at most {MOST_TEXT} are kept"):
        spec_of(("a" * MOST_TEXT,), {})


def test_autocast_to_what_no_text_tells_is_refused(monkeypatch):
    with torch.autocast("cpu"):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float64)
        with pytest.raises(Refusal, match="autocast to float64, which cannot be told in text"):
            spec_of((), {})


GOOD = {"args": [1], "kwargs": [["a", 2]], "modes": {"grad": True, "inference": False, "autocast": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, r"^call is .*; expected 'args', 'kwargs' and 'modes'"),
        ({"args": None}, r"^args.tuple is None; expected a list"),
        ({"args": [{"set": []}]}, r"^args.tuple\[0\] is"),
        ({"kwargs": [[1, 2]]}, r"^a key of kwargs is 1; expected text"),
        ({"modes": None}, r"^modes is None; expected 'grad', 'inference' and 'autocast'"),
        ({"modes": GOOD["modes"] | {"grad": 1}}, r"^modes.grad is 1; expected true or false"),  # type: ignore[operator]
        ({"modes": GOOD["modes"] | {"autocast": []}}, r"^modes.autocast is \[\]; expected"),  # type: ignore[operator]
        (
            {"modes": {"grad": True, "inference": True, "autocast": {"tpu": "float16"}}},
            r"^modes.autocast is \{'tpu': 'float16'\}; expected 'cuda', 'cpu', both or neither",
        ),
        (
            {"modes": {"grad": True, "inference": True, "autocast": {"cpu": "int8"}}},
            r"^modes.autocast.cpu is 'int8'; expected one of float16, bfloat16",
        ),
        ({"args": ["a" * MOST_TEXT]}, r"^call is '\d+ characters'; expected at most 65536"),
    ],
)
def test_a_tree_that_is_no_call_is_refused_by_name(change, message):
    assert Spec.of_tree(GOOD).tree == GOOD
    with pytest.raises(TreeError, match=message):
        Spec.of_tree(GOOD | change)


@pytest.mark.parametrize("tree", [None, [], 5, "a", {}, {"args": []}])
def test_what_is_no_call_at_all_is_refused(tree):
    with pytest.raises(TreeError, match=r"^call is .*; expected 'args', 'kwargs' and 'modes'"):
        Spec.of_tree(tree)
