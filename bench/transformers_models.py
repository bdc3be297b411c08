"""Which small random models of Transformers are captured whole: ``python -m bench.transformers_models --out FILE``.

Each model is called ten times with two shapes in turn, without its own cache, and held against a copy that runs
eagerly. Needs a GPU, transformers, and the list of models in ``tests``. Run it in two checkouts to compare them.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch

CALLS = 10
SIZES = (1, 2)


def drive(model: Any) -> dict[str, Any]:
    """What became of the calls of one model, and how far its answers were from those of the copy."""
    import graphcache
    from tests.modules import test_transformers as models

    module = models.build(model).cuda()
    twin = copy.deepcopy(module)
    fast = graphcache.wrap(module)
    options = {"use_cache": False} if model.inputs in models.CACHED else {}
    error = 0.0
    with torch.no_grad():
        for call in range(CALLS):
            given = models.inputs(model, SIZES[call % len(SIZES)], call)
            given = {name: value.cuda() for name, value in given.items()}
            answer, expected = fast(**given, **options), twin(**given, **options)
            for one, other in zip(models.tensors(answer), models.tensors(expected), strict=True):
                error = max(error, float((one - other).abs().max()) if one.is_floating_point() else 0.0)
    same = all(map(torch.equal, module.state_dict().values(), twin.state_dict().values()))
    info = fast.cache_info()
    return {
        "hits": info.hits,
        "captures": info.captures,
        "eager": {reason.value: count for reason, count in info.eager.items()},
        "parts": len(fast.parts),
        "whole": bool(info.hits) and not len(fast.parts),
        "largest_error": error,
        "state_equal": same and models.plain(module) == models.plain(twin),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    from tests.modules import test_transformers as models

    found: dict[str, Any] = {}
    for model in models.MODELS:
        try:
            found[model.name] = drive(model)
        except Exception as error:
            found[model.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(model.name, found[model.name], flush=True)
    from bench.record import environment

    arguments.out.write_text(json.dumps({"environment": environment(0), "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
