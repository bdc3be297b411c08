from __future__ import annotations

import dataclasses

import pytest

from graphcache import GraphConfig
from graphcache.config import Modes, graphs_off, modes, switch_in_environment
from graphcache.errors import ConfigError


def test_a_config_is_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GraphConfig().max_graphs = 2  # type: ignore[misc]
    assert GraphConfig(max_graphs=2) == GraphConfig(max_graphs=2) != GraphConfig()


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        GraphConfig("auto")  # type: ignore[misc]


@pytest.mark.parametrize("option", ["strategy", "isolation", "on_failure"])
@pytest.mark.parametrize("value", ["", "Auto", None, 1, ["auto"]])
def test_a_literal_option_takes_only_its_literals_and_says_which(option, value):
    with pytest.raises(ConfigError, match=rf"^{option}=.* is not an option; expected one of '\w+', '\w+'"):
        GraphConfig(**{option: value})


@pytest.mark.parametrize("option", ["max_graphs", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8"])
def test_a_budget_is_a_whole_number_of_at_least_one(option, value):
    with pytest.raises(ConfigError, match=rf"{option}=.*: expected a whole number, 1 or more"):
        GraphConfig(**{option: value})


def test_only_the_budget_in_bytes_may_be_unbounded():
    assert GraphConfig(max_bytes=None).max_bytes is None
    with pytest.raises(ConfigError, match="max_graphs=None"):
        GraphConfig(max_graphs=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["encoder", [1], [None], 5, None])
def test_include_takes_a_sequence_of_names(value):
    with pytest.raises(ConfigError, match="expected a sequence of submodule names"):
        GraphConfig(include=value)


def test_include_is_kept_as_a_tuple_so_that_configs_stay_hashable():
    assert hash(GraphConfig(include=["a", "b"])) == hash(GraphConfig(include=("a", "b")))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_verify_is_a_bool(value):
    with pytest.raises(ConfigError, match="expected True or False"):
        GraphConfig(verify=value)


def test_an_unknown_option_is_answered_with_the_known_ones():
    for make in (lambda: GraphConfig.of({"max_graph": 3}), lambda: GraphConfig(max_graph=3)):
        with pytest.raises(ConfigError, match=r"unknown option 'max_graph'; the options are .*max_graphs"):
            make()


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("outputs", "forward_into"),
        ("templates", "max_graphs and max_bytes"),
        ("io", "isolation='full'"),
        ("edges", "isolation='full'"),
        ("contexts", "isolation='full'"),
        ("weights", "always checked, by a native check"),
    ],
)
def test_a_removed_option_says_what_to_use_instead(option, instead):
    for make in (lambda: GraphConfig(**{option: 1}), lambda: GraphConfig.of({option: 1})):
        with pytest.raises(ConfigError, match=rf"^the option {option} was removed in version 0\.2: .*{instead}"):
            make()


def test_options_go_over_the_environment_and_that_over_the_defaults(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_MAX_GRAPHS", " 7 ")
    monkeypatch.setenv("GRAPHCACHE_MAX_BYTES", "1024")
    assert GraphConfig.of({}) == GraphConfig(max_graphs=7, max_bytes=1024)
    assert GraphConfig.of({"max_bytes": 5}) == GraphConfig(max_graphs=7, max_bytes=5)


def test_an_empty_variable_is_no_variable(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_MAX_GRAPHS", "  ")
    assert GraphConfig.of({}) == GraphConfig()


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", "0x10", "²"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, text):
    monkeypatch.setenv("GRAPHCACHE_MAX_BYTES", text)
    with pytest.raises(ConfigError, match=r"GRAPHCACHE_MAX_BYTES=.*: expected a whole number"):
        GraphConfig.of({})


@pytest.mark.parametrize(
    ("text", "off"), [("1", True), ("TRUE", True), (" true ", True), ("0", False), ("False", False), ("", False)]
)
def test_the_switch_in_the_environment(monkeypatch, text, off):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", text)
    assert switch_in_environment("GRAPHCACHE_DISABLE") is off


def test_a_switch_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "off")
    with pytest.raises(ConfigError, match=r"GRAPHCACHE_DISABLE='off': expected 1, true, 0, false or nothing"):
        switch_in_environment("GRAPHCACHE_DISABLE")


def test_graphs_are_off_inside_the_block_and_back_after_an_exception():
    with pytest.raises(KeyError), graphs_off():
        assert modes.get() == Modes(graphs="off")
        raise KeyError
    assert modes.get() == Modes()
