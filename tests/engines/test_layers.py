"""The layers of an engine, as the inspector's lines tell them."""

from contextlib import nullcontext
from types import SimpleNamespace

from graphcache.engines.layers import layers_of

TEXT = """Layers:
node_of_y
  Reformatting CopyNode for Input Tensor 0

Bindings:
x
y"""


def engine(raw):
    trt = SimpleNamespace(LayerInformationFormat=SimpleNamespace(ONELINE="oneline"))
    return SimpleNamespace(parts=(None, raw, None, None), trt=trt, collect_errors=lambda: nullcontext([]))


def test_a_line_for_each_layer_without_the_bindings():
    asked = []
    inspector = SimpleNamespace(get_engine_information=lambda form: asked.append(form) or TEXT)
    found = layers_of(engine(SimpleNamespace(create_engine_inspector=lambda: inspector)))
    assert found == ["node_of_y", "Reformatting CopyNode for Input Tensor 0"]
    assert asked == ["oneline"]


def test_nothing_is_told_where_nothing_can_be():
    assert layers_of(engine(SimpleNamespace())) == []
    silent = SimpleNamespace(get_engine_information=lambda form: None)
    assert layers_of(engine(SimpleNamespace(create_engine_inspector=lambda: silent))) == []
