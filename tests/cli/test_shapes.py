"""The grammar of shapes: what is written is read back, what is malformed is shown where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cli.shapes import ShapeSyntaxError, Spec, looks_like, parse, quoted, written

names = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_./-]{0,12}", fullmatch=True),
    st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=8).filter(
        lambda name: not ("'" in name and '"' in name)
    ),
)
shapes = st.lists(st.integers(0, 2**63 - 1), max_size=5).map(tuple)
specs = st.builds(
    Spec,
    names,
    st.one_of(st.tuples(shapes), st.tuples(shapes, shapes, shapes)),
    st.one_of(st.none(), st.sampled_from(["float16", "int64", "bool"])),
)
groups = st.lists(specs, min_size=1, max_size=4, unique_by=lambda spec: spec.name).map(tuple)


@given(groups, st.sampled_from([",", " ", ", ", " ,  "]))
def test_what_is_written_with_brackets_is_read_back(group, separator):
    assert parse(separator.join(map(str, group))) == group


@given(groups)
def test_what_is_written_with_crosses_is_read_back(group):
    words = [":".join([quoted(spec.name), *map(written, spec.shapes)]) for spec in group]
    assert parse(",".join(words)) == tuple(Spec(spec.name, spec.shapes) for spec in group)


@given(st.text(alphabet="xy:[],' \"0159q-.", max_size=20))
def test_any_text_is_read_or_refused_at_a_place_inside_it(text):
    refused = None
    try:
        found = parse(text)
    except ShapeSyntaxError as error:
        refused = error
    if refused is None:
        assert parse(",".join(map(str, found))) == found
    else:
        *_, shown, mark = str(refused).split("\n")
        assert 0 <= refused.position <= len(text)
        assert (len(shown), mark.index("^")) == (len(text) + 2, refused.position + 2)


@given(groups)
def test_what_is_written_looks_like_a_shape_unless_it_has_a_separator_or_a_dash(group):
    for spec in group:
        if not any(character.isspace() or character in ",:'\"-" for character in spec.name):
            assert looks_like(f"{spec.name}:{written(spec.shapes[0])}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of an input, such as x in x:1x64 at column 1:\n  \n  ^"),
        (" , ", "expected the name of an input, such as x in x:1x64 at column 4:\n   , \n     ^"),
        ("x", "expected ':' and a shape after the name 'x' at column 2:\n  x\n   ^"),
        ("x=1x64", "expected ':' and a shape after the name 'x=1x64' at column 7:\n  x=1x64\n        ^"),
        ("x:", "expected a size (a whole number, 0 or more) at column 3:\n  x:\n    ^"),
        ("x:1xq", "expected a size (a whole number, 0 or more) at column 5:\n  x:1xq\n      ^"),
        ("x:[-1,64]", "expected a size (a whole number, 0 or more) at column 4:\n  x:[-1,64]\n     ^"),
        ("x:[1,64", "expected ',' or ']' at column 8:\n  x:[1,64\n         ^"),
        ("x:1x64*2", "expected ':', ',' or the end at column 7:\n  x:1x64*2\n        ^"),
        ("x:1,x:2", "'x' is named twice; expected another input at column 5:\n  x:1,x:2\n      ^"),
        (
            "x:1:2",
            "2 shapes for 'x'; expected one, or three (smallest, usual, largest) at column 6:\n  x:1:2\n       ^",
        ),
        ("x:99999999999999999999", "expected a size of at most 9223372036854775807 at column 3:\n"),
        ("x:1\ty:q", "expected a size (a whole number, 0 or more) at column 7:\n  x:1 y:q\n        ^"),
    ],
)
def test_malformed(text, message):
    with pytest.raises(ShapeSyntaxError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_names_with_separators_are_quoted():
    assert parse("'input:0':1x64") == (Spec("input:0", ((1, 64),)),)
    assert quoted("input:0") == "'input:0'"
    assert quoted("it's") == '"it\'s"'
    assert quoted("x.1") == "x.1"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("x:1x64", True),
        ("x:[1,64]", True),
        ("x:[1,q", True),
        ("'input:0':4", True),
        ("nets:mlp", False),
        ("nets.py:mlp", False),
        ("model.onnx", False),
        ("--json", False),
        ("C:\\model.onnx", False),
    ],
)
def test_which_words_are_taken_for_shapes(word, expected):
    assert looks_like(word) is expected
