"""Options that were removed raise an error that says so and what to use instead."""

import pytest

import graphcache
from graphcache import GraphConfig
from tests.helpers import mlp

REMOVED = {
    "io": "isolation",
    "edges": "isolation",
    "contexts": "isolation",
    "weights": "always checked",
    "templates": "max_graphs",
    "outputs": "forward_into",
}
"""What the message names in place of each option of version 0.1."""


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_says_what_to_use_instead(name):
    message = rf"the option {name} was removed in version 0\.2: .*{REMOVED[name]}"
    for use in (lambda **options: graphcache.wrap(mlp(), **options), GraphConfig):
        with pytest.raises(ValueError, match=message):
            use(**{name: "anything"})


def test_a_removed_option_is_no_option():
    assert not REMOVED.keys() & GraphConfig.__dataclass_fields__.keys()


def test_an_unknown_option_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown option 'max_graph'; the options are .*max_graphs"):
        graphcache.wrap(mlp(), max_graph=3)
