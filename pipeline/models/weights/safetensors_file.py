"""The safetensors format, read by its own library into NumPy's arrays."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from pipeline.errors import WeightsError

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
    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise WeightsError(f"{path}: is cut off or damaged ({error}); download or copy it again") from None
    arrays = {}
    for name, entry in entries:
        dtype = entry["dtype"]
        if dtype not in DTYPES:
            raise WeightsError(f"{path}: tensor {name} has the dtype {dtype}; save it as F32")
        array = np.frombuffer(entry["data"], DTYPES[dtype]).reshape(entry["shape"])
        arrays[name] = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
    return arrays
