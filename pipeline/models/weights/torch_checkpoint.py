"""PyTorch weight files (.pth, .pt) read with NumPy: no torch needed, and nothing in the file is executed.

Both of `torch.save`'s formats are understood: the zip archive (torch 1.6 and later) and the legacy stream of pickles
with the raw storages behind them. A pickle is a program for a small machine; this one knows only the instructions and
names that containers, numbers, strings and tensors need. It builds on the Python implementation in `pickle`, since the
C one lets no instruction be taken away.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import WeightsError

LEGACY_HEADER = [0x1950A86A20F9469CFC6C, 1001]  # magic number, protocol
NESTED_UNDER = ("state_dict", "model")  # keys of a training checkpoint that hold its weights
REMEDY = "save the weights alone, with torch.save(model.state_dict(), ...)"

STORAGES = {  # torch's storage class -> the dtype of its bytes
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",  # the upper half of a float32
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.BININT,
        pickle.BININT1,
        pickle.BININT2,
        pickle.LONG1,
        pickle.BINFLOAT,
    ),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BINPERSID),
)


class Storage(NamedTuple):
    """A run of numbers that tensors are views of."""

    key: str
    kind: str
    numbers: int

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.numbers * np.dtype(STORAGES[self.kind]).itemsize


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a saved state dict, or of the one under `state_dict` or `model` of a saved checkpoint.

    Args:
        path: A file that `torch.save` wrote.

    Returns:
        Arrays by name, in the file's order and dtypes; bfloat16 comes as float32.

    Raises:
        WeightsError: The file cannot be read, is damaged, or holds anything but tensors in plain containers.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            tensors, data = _read_zip(file, size) if zipfile.is_zipfile(file) else _read_legacy(file, size)
        return {name: _array(tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # bytes that are no pickle may fail in any way that Python knows
        raise WeightsError(
            f"{path}: is not a torch weights file, or is damaged ({type(error).__name__}: {error})"
        ) from None


def _read_zip(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise WeightsError("holds compressed members, which torch.save does not write")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("is a zip archive, but not one of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise WeightsError("was saved on a big-endian machine, which is not supported")
        with archive.open(pickles[0]) as stream:
            machine = _Unpickler(stream)
            tensors = _tensors(machine.load(), machine.storages, size)
        return tensors, {
            key: _check_length(archive.read(f"{folder}data/{key}"), storage)
            for key, storage in machine.storages.items()
        }


def _read_legacy(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    file.seek(0)
    if [_Unpickler(file).load(), _Unpickler(file).load()] != LEGACY_HEADER:
        raise WeightsError("is not a torch weights file")
    if not _Unpickler(file).load()["little_endian"]:
        raise WeightsError("was saved on a big-endian machine, which is not supported")
    machine = _Unpickler(file)
    tensors = _tensors(machine.load(), machine.storages, size)
    data = {}
    for key in _Unpickler(file).load():
        if not isinstance(key, str) or key not in machine.storages:
            raise WeightsError("is damaged: it holds a storage that no tensor uses")
        storage = machine.storages[key]
        (numbers,) = struct.unpack("<q", file.read(8))
        if numbers != storage.numbers:
            raise WeightsError(f"is damaged: storage {key} has {numbers} numbers and should have {storage.numbers}")
        data[key] = _check_length(file.read(storage.bytes), storage)
    return tensors, data


def _tensors(saved: Any, storages: dict[str, Storage], file_size: int) -> dict[str, Tensor]:
    """Pick the state dict out of what was saved.

    Having made sure that reading it takes no more memory than the file accounts for.
    """
    nested = [saved[key] for key in NESTED_UNDER if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping)]
    weights = nested[0] if nested else saved
    items = weights.items() if isinstance(weights, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"holds no tensors by name; {REMEDY}")
    if sum(storage.bytes for storage in storages.values()) > file_size:
        raise WeightsError("is cut off: its tensors need more bytes than it has")
    if sum(math.prod(tensor.shape) for tensor in tensors.values()) > 4 * file_size:
        raise WeightsError("is damaged: its tensors overlap")
    return tensors


def _check_length(data: bytes, storage: Storage) -> bytes:
    if len(data) != storage.bytes:
        raise WeightsError(f"is damaged: storage {storage.key} has {len(data)} bytes and should have {storage.bytes}")
    return data


def _array(tensor: Tensor, data: bytes) -> np.ndarray:
    numbers = np.frombuffer(data, STORAGES[tensor.storage.kind])[tensor.offset :]
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    view = np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides)).reshape(tensor.shape)
    if tensor.storage.kind == "BFloat16Storage":
        return (view.astype("<u4") << 16).view("<f4")
    return view


class _Unpickler(pickle._Unpickler):
    """The machine. Tensors come out as `Tensor`; the storages that they name are collected in `storages`."""

    stack: list[Any]  # the base class's
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): lambda: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
        }
        if (module, name) not in known:
            raise WeightsError(
                f"refers to {module}.{name}, which no weights file needs; nothing of it was run. In torch, {REMEDY}"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        tag, kind, key, _location, numbers, *view = pid
        if tag != "storage" or kind not in STORAGES or not isinstance(key, str) or not _is_count(numbers) or any(view):
            raise WeightsError("is damaged: it refers to a storage that cannot be")
        storage = Storage(key, kind, numbers)
        if self.storages.setdefault(key, storage) != storage:
            raise WeightsError(f"is damaged: it describes storage {key} in two ways")
        return storage

    def _rebuild_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        valid = (
            isinstance(shape, tuple) and isinstance(strides, tuple) and all(map(_is_count, (offset, *shape, *strides)))
        )
        if not isinstance(storage, Storage) or not valid or len(shape) != len(strides) or len(shape) > 8:
            raise WeightsError("is damaged: it holds a tensor of no shape")
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        if (0 not in shape and last >= storage.numbers) or math.prod(shape) > storage.numbers:
            raise WeightsError(f"is damaged: a tensor of shape {shape} reaches beyond storage {storage.key}")
        return Tensor(storage, offset, shape, strides)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in items[::2]):
            raise WeightsError("is damaged: it holds a mapping whose keys are no names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_build(self) -> None:
        self.stack.pop()  # the attribute _metadata of a state dict: module versions, of no use here

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in INSTRUCTIONS} | {  # type: ignore[assignment]
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
