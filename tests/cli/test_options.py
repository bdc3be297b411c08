"""From options to the shapes that are built and run."""

import click
import pytest

from graphcache.cli.options import join_words, points, ranges, spanned
from graphcache.cli.shapes import parse


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("--shapes x:1 y:2 m.onnx", ["--shapes", "x:1 y:2", "m.onnx"]),
        ("--shapes=x:1 y:2 m.onnx", ["--shapes=x:1 y:2", "m.onnx"]),
        ("m.onnx --shapes x:1 --json y:2", ["m.onnx", "--shapes", "x:1", "--json", "y:2"]),
        ("nets:mlp --shapes x:1 -- y:2", ["nets:mlp", "--shapes", "x:1", "--", "y:2"]),
        ("--shapes x:1 nets:mlp", ["--shapes", "x:1", "nets:mlp"]),
        ("--shapes", ["--shapes"]),
        ("--shapes x:1 --shapes x:2 y:3", ["--shapes", "x:1", "--shapes", "x:2 y:3"]),
    ],
)
def test_words_that_belong_to_an_option_are_joined(words, joined):
    assert join_words(words.split(), ["--shapes"]) == joined


def specs(*texts):
    return [parse(text) for text in texts]


def test_a_range_a_single_shape_and_several_profiles():
    assert ranges(specs("x:1:2:3,y:4"), [], [], []) == {"x": ((1,), (2,), (3,)), "y": ((4,), (4,), (4,))}
    assert ranges(specs("x:1:2:3", "x:5:6:7"), [], [], []) == {"x": [((1,), (2,), (3,)), ((5,), (6,), (7,))]}
    assert ranges([], [], [], []) == {}


def test_smallest_usual_and_largest_by_options_of_their_own():
    assert ranges([], specs("x:1"), specs("x:2 y:5"), specs("x:3")) == {
        "x": ((1,), (2,), (3,)),
        "y": ((5,), (5,), (5,)),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["x:1"], [], ["x:2"], []), "'x' is named by --shapes and by --min-shapes"),
        (([], ["x:1"], [], ["x:2"]), "'x' needs --opt-shapes alone, or all of"),
        (([], ["x:1"], ["x:1"], []), "'x' needs --opt-shapes alone, or all of"),
        (([], [], ["x:1:2:3"], []), "--opt-shapes takes one shape for each input; 'x' has 3"),
        (([], [], ["x:1", "x:2"], []), "--opt-shapes names 'x' twice; several profiles are given with --shapes"),
        ((["x:1:int64"], [], [], []), "'x' has the dtype 'int64'; a model's inputs have their own"),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(click.UsageError) as caught:
        ranges(*(specs(*texts) for texts in given))
    assert message in str(caught.value)


def test_the_points_of_a_range_are_run_once_each():
    found = [{name: str(spec) for name, spec in point.items()} for point in points(specs("x:1:4:4,y:2", "x:4,y:2"))]
    assert found == [{"x": "x:[1]", "y": "y:[2]"}, {"x": "x:[4]", "y": "y:[2]"}]


def test_what_is_run_is_what_is_built_for():
    assert spanned(specs("x:4x1", "x:2x8")) == {"x": ((2, 1), (4, 1), (4, 8))}
    assert spanned(specs("x:1:4:9")) == {"x": ((1,), (4,), (9,))}
    with pytest.raises(click.UsageError, match="'x' has shapes of different numbers of dimensions"):
        spanned(specs("x:4x1", "x:4"))
