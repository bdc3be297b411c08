"""A folder for the Python backend of a Triton server that is there already."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphcache.errors import ServingError, shown
from graphcache.modules.cached_module import CachedModule
from graphcache.persist.loading import load
from graphcache.persist.package_file import Container
from graphcache.serving.backend import ModelSpec, TensorMetadata
from graphcache.serving.local import spec_of
from graphcache.serving.protocol.dtypes import datatype_of
from graphcache.serving.repository import NAME
from graphcache.serving.triton_backend import PARAMETER
from graphcache.version import __version__

Shapes = Mapping[str, tuple[int, ...]]

_MODEL = '''"""Written by graphcache {version}: Triton's Python backend looks for the class here."""

from graphcache.serving.triton_backend import TritonPythonModel as TritonPythonModel
'''


def describe_file(path: Path, name: str) -> ModelSpec:
    """What a model in a file takes and gives.

    A package of one engine says so itself; an engine has to be loaded, which needs its GPU.
    """
    if path.suffix != ".gcache":
        engine = load(path)
        return spec_of(name, engine.module if isinstance(engine, CachedModule) else engine)
    with Container(path) as container:
        header = container.header()
    if header.kind != "engine":
        raise ServingError(
            f"{path} holds a model of {len(header.engines)} engines and weights, which is loaded into code of yours; "
            f"expected a package of one engine"
        )
    [engine_] = header.engines
    try:
        bindings = {
            each["name"]: TensorMetadata(each["name"], each["dtype"], tuple(each["shape"])) for each in engine_.bindings
        }
        inputs, outputs = (tuple(bindings[name] for name in names) for names in (engine_.inputs, engine_.outputs))
    except (KeyError, TypeError) as error:
        raise ServingError(f"{path} does not tell all bindings of its engine ({error}); save it again") from error
    return ModelSpec(name, ("1",), inputs, outputs, "tensorrt")


def config_pbtxt(spec: ModelSpec, file: str, prepare: Sequence[Shapes] = ()) -> str:
    """The configuration that Triton wants of a model.

    Batches are the first axis of the shapes, and not Triton's: ``max_batch_size`` is 0, so its dynamic batching stays
    off.
    """
    own = json.dumps({"file": file, "prepare": [{name: list(each[name]) for name in each} for each in prepare]})
    parts = [f"name: {_quoted(spec.name)}", 'backend: "python"', "max_batch_size: 0"]
    for what, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        parts += [f"{what} [", ",\n".join(map(_tensor, tensors)), "]"] if tensors else []
    parts += [
        "instance_group [ { kind: KIND_GPU count: 1 } ]",
        f"parameters {{ key: {_quoted(PARAMETER)} value: {{ string_value: {_quoted(own)} }} }}",
        "# Inputs stay on the GPU where they lie there.",
        'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value: { string_value: "no" } }',
    ]
    return "\n".join(parts) + "\n"


def export(path: Path, folder: Path, *, prepare: Sequence[Shapes] = ()) -> ModelSpec:
    """Write a folder for Triton's model repository, in one step."""
    name = folder.resolve().name
    if not NAME.fullmatch(name):
        raise ServingError(
            f"{folder}: {shown(name)} is no name of a model; expected letters, digits, '.', '_' and '-', the first of "
            f"them a letter or a digit"
        )
    if os.path.lexists(folder):
        raise ServingError(f"{folder} is there already; choose another folder, or remove it")
    spec = describe_file(path, name)
    for shapes in prepare:
        _check(shapes, spec)
    file = f"model{path.suffix if path.suffix == '.gcache' else '.engine'}"
    contents = {"config.pbtxt": config_pbtxt(spec, file, prepare), "1/model.py": _MODEL.format(version=__version__)}
    try:
        _write(folder, contents, path, f"1/{file}")
    except OSError as error:
        raise ServingError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    return spec


def _write(folder: Path, contents: Mapping[str, str], source: Path, target: str) -> None:
    # Triton may be watching the folder above: its names are taken whole.
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".graphcache-"))
    try:
        (made / "1").mkdir()
        for name, text in contents.items():
            (made / name).write_text(text, encoding="utf-8")
        shutil.copyfile(source, made / target)
        made.chmod(0o755)
        os.rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _check(shapes: Shapes, spec: ModelSpec) -> None:
    inputs = {each.name: each.shape for each in spec.inputs}
    if unknown := [name for name in shapes if name not in inputs]:
        raise ServingError(f"shapes name {unknown[0]!r}, which is no input; the inputs are {', '.join(inputs)}")
    for name, expected in inputs.items():
        if name not in shapes and -1 in expected:
            raise ServingError(f"shapes leave out the input {name!r}, whose sizes are open; give it too")
        given = shapes.get(name, expected)
        fits = len(given) == len(expected)
        if not fits or any(wanted not in (-1, size) for size, wanted in zip(given, expected, strict=True)):
            raise ServingError(
                f"the shape {list(given)} of {name!r} does not fit {list(expected)}, where -1 is any size"
            )


def _tensor(spec: TensorMetadata) -> str:
    head = f"  {{ name: {_quoted(spec.name)} data_type: TYPE_{datatype_of(spec.dtype)}"
    # Triton has no tensors without dimensions but by reshaping.
    if not spec.shape:
        return f"{head} dims: [ 1 ] reshape: {{ shape: [ ] }} }}"
    return f"{head} dims: [ {', '.join(map(str, spec.shape))} ] }}"


def _quoted(text: str) -> str:
    """A string in the text form of protocol buffers."""
    plain = (chr(each) if 32 <= each < 127 and each not in b'"\\' else f"\\{each:03o}" for each in text.encode())
    return f'"{"".join(plain)}"'


def facts(spec: ModelSpec) -> dict[str, Any]:
    """Names, datatypes and shapes, for whoever prints them."""
    return {
        side: [{"name": each.name, "dtype": each.dtype, "shape": list(each.shape)} for each in tensors]
        for side, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs))
    }
