"""Datatypes of the protocol and dtypes of torch.

The names are those of the Open Inference Protocol (https://github.com/kserve/open-inference-protocol, section "Tensor
Data Types") and of Triton, which adds BF16.
"""

from __future__ import annotations

import torch

from graphcache.errors import ServingError, shown
from graphcache.serving.protocol.problems import RequestError

DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
"""Every datatype but ``BYTES``, which holds text and so is no tensor of torch."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(datatype: object, where: str) -> torch.dtype:
    """The dtype of a datatype that a request names."""
    found = DTYPES.get(datatype) if isinstance(datatype, str) else None
    if found is None:
        why = "text is not served" if datatype == "BYTES" else "there is no such datatype"
        raise RequestError(f"{where}: datatype {shown(datatype)}: {why}; expected one of {', '.join(DTYPES)}")
    return found


def datatype_of(dtype: torch.dtype | str) -> str:
    """The protocol's name of a dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    name = _NAMES.get(found) if isinstance(found, torch.dtype) else None
    if name is None:
        raise ServingError(
            f"the protocol has no datatype for {shown(dtype)}; expected one of "
            f"{', '.join(str(each).removeprefix('torch.') for each in _NAMES)}: cast it inside the model"
        )
    return name
