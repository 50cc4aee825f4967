"""The safetensors format, read with NumPy: a JSON header with names, shapes and places, and the raw numbers."""

import json
import math
import struct
from pathlib import Path

import numpy as np

from pipeline.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"},  # BF16: the upper half of a float32
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file.

    Args:
        path: A .safetensors file.

    Returns:
        Arrays by name; bfloat16 comes as float32.

    Raises:
        WeightsError: The file is damaged or cut off, or has tensors of a dtype that no weights have.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise WeightsError(f"{path}: is cut off or damaged: its header should have {length} bytes")
        try:
            header = json.loads(file.read(length))
            entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path}: is damaged: its header cannot be read ({error})") from None
        data = file.read()
    arrays = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: tensor {name} has the dtype {dtype}; save it as F32")
        if end > len(data):
            raise WeightsError(f"{path}: is cut off: it has {size:,} bytes and should have {size + end - len(data):,}")
        kind = np.dtype(DTYPES[dtype])
        if end - begin != math.prod(shape) * kind.itemsize:
            raise WeightsError(f"{path}: is damaged: tensor {name} of shape {shape} has {end - begin} bytes")
        array = np.frombuffer(data, kind, math.prod(shape), begin).reshape(shape)
        arrays[name] = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
    return arrays


def _entry(entry: dict[str, object]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("an entry is not of dtype, shape and offsets")
    begin, end = offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError("a shape or an offset is no count")
    return dtype, tuple(shape), begin, end
