"""The layers of an engine, as TensorRT's inspector tells them."""

from __future__ import annotations

from graphcache.engines.engine import Engine


def layers_of(engine: Engine) -> list[str]:
    """One line for each layer. An engine that was built without detail tells names alone.

    Args:
        engine: The engine.

    Returns:
        The lines; none where this flavour of TensorRT has no inspector.
    """
    _, raw, *_ = engine.parts
    make = getattr(raw, "create_engine_inspector", None)
    if make is None:
        return []
    with engine.collect_errors():
        text = make().get_engine_information(engine.trt.LayerInformationFormat.ONELINE)
    lines = [line.strip() for line in str(text or "").splitlines()]
    # The inspector tells the bindings after the layers.
    end = next((index for index, line in enumerate(lines) if line.startswith("Bindings:")), len(lines))
    return [line for line in lines[:end] if line and not line.startswith(("Layers:", "Profiles:"))]
