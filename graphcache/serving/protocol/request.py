"""An inference request from its body: JSON, and after it the binary data of tensors.

The rules are those of the Open Inference Protocol and of Triton's extension for binary tensor data
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphcache.errors import shown
from graphcache.serving.protocol.dtypes import dtype_of
from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.tensors import check_shape, from_binary, from_json

Buffer = bytes | bytearray | memoryview

_REFUSED = {
    "sequence_id": "sequences of requests are not served",
    "shared_memory_region": "shared memory is not served",
    "classification": "classification is not served",
}
"""Parameters that would change the answer; any other unknown one is ignored, as the protocol wants it."""


@dataclass(frozen=True)
class InferenceRequest:
    """What a request asks for.

    Args:
        id: What the answer is to repeat, if anything.
        inputs: By name. They share the body's memory wherever they can.
        outputs: By name, whether as binary data; ``None`` for all of the model's.
        binary: Whether outputs that are not named come as binary data.
    """

    id: str | None
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, bool] | None
    binary: bool


def read_header_length(text: str | None) -> int | None:
    """The value of ``Inference-Header-Content-Length``: the bytes of JSON at the start of a body."""
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise RequestError(f"Inference-Header-Content-Length: {shown(text)}; expected a whole number, 0 or more")
    return int(text)


def read_request(body: Buffer, header_length: int | None = None) -> InferenceRequest:
    """Read a request.

    Memory is taken for what is there, never for what the request claims. Tensors share the memory of a body that can be
    written: it has to stay as it is while they are used. ``header_length`` is that of the JSON; ``None``: all is JSON.
    """
    view = memoryview(body).cast("B")
    length = view.nbytes if header_length is None else header_length
    if not 0 <= length <= view.nbytes:
        raise RequestError(
            f"Inference-Header-Content-Length is {length}, but the body has {view.nbytes} bytes; expected no more"
        )
    tree = _object(_json(view[:length]), "the request")
    parameters = _parameters(tree, "the request")
    identity = tree.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RequestError(f"id {shown(identity)}: expected text")
    binary = _flag(parameters, "binary_data_output", False, "the request")
    return InferenceRequest(identity, _inputs(tree, view[length:]), _outputs(tree, binary), binary)


def _json(data: memoryview) -> Any:
    try:
        return json.loads(bytes(data))
    except RecursionError as error:
        raise RequestError("the JSON of the request is nested too deeply") from error
    except ValueError as error:
        # Bytes that are no text are among these, and numbers of thousands of digits.
        raise RequestError(f"the request is no JSON: {error}") from error


def _inputs(tree: Mapping[str, Any], binary: memoryview) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    start = 0
    for index, each in enumerate(_list(tree, "inputs", required=True)):
        name = _name(each, f"inputs[{index}]")
        where = f"input {shown(name)}"
        if name in found:
            raise RequestError(f"{where} is there twice")
        dtype, shape = dtype_of(each.get("datatype"), where), check_shape(each.get("shape"), where)
        size = _parameters(each, where).get("binary_data_size")
        if size is None:
            if "data" not in each:
                raise RequestError(f"{where} has neither data nor the parameter binary_data_size")
            found[name] = from_json(each["data"], dtype, shape, where)
            continue
        if "data" in each:
            raise RequestError(f"{where} has both data and the parameter binary_data_size; expected one of them")
        needed = math.prod(shape) * dtype.itemsize
        if type(size) is not int or size != needed:
            raise RequestError(
                f"{where}: binary_data_size {shown(size)}; expected {needed} for {each['datatype']} {list(shape)}"
            )
        if size > binary.nbytes - start:
            raise RequestError(f"{where}: {size} bytes are announced, {binary.nbytes - start} are left in the body")
        found[name] = from_binary(binary[start : start + size], dtype, shape)
        start += size
    if start != binary.nbytes:
        raise RequestError(f"the body has {binary.nbytes - start} bytes that belong to no input")
    return found


def _outputs(tree: Mapping[str, Any], binary: bool) -> dict[str, bool] | None:
    listed = _list(tree, "outputs", required=False)
    if not listed:
        return None
    found: dict[str, bool] = {}
    for index, each in enumerate(listed):
        name = _name(each, f"outputs[{index}]")
        where = f"output {shown(name)}"
        if name in found:
            raise RequestError(f"{where} is there twice")
        found[name] = _flag(_parameters(each, where), "binary_data", binary, where)
    return found


def _list(tree: Mapping[str, Any], field: str, *, required: bool) -> list[Mapping[str, Any]]:
    found = tree.get(field)
    if found is None and not required:
        return []
    if not isinstance(found, list):
        raise RequestError(f"{field}: {shown(found)}; expected a list of objects")
    return [_object(each, f"{field}[{index}]") for index, each in enumerate(found)]


def _name(tree: Mapping[str, Any], where: str) -> str:
    name = tree.get("name")
    if not isinstance(name, str):
        raise RequestError(f"{where}: name {shown(name)}; expected text")
    return name


def _parameters(tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = tree.get("parameters")
    parameters = {} if found is None else _object(found, f"the parameters of {where}")
    for name, why in _REFUSED.items():
        # 0 and an empty name are how clients say that there is none.
        if parameters.get(name) not in (None, 0, ""):
            raise RequestError(f"{where}: parameter {name}: {why}")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise RequestError(f"{where}: parameter {name} is {shown(found)}; expected true or false")
    return found


def _object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise RequestError(f"{where} is {shown(found)}; expected an object")
    return found
