"""PyTorch weight files (.pth, .pt) read with NumPy: no torch needed, and nothing in the file is executed.

Both of `torch.save`'s formats are understood: the zip archive (torch 1.6 and later) and the legacy stream of pickles
with the raw storages behind them. A pickle is a program for a small machine; this one knows only the instructions and
names that containers, numbers, strings and tensors need. Any other object that a checkpoint holds beside its weights,
such as the arguments of a training script, becomes a `Placeholder`: a name and a state, without the class's code. The
machine builds on the Python implementation in `pickle`, since the C one lets no instruction be taken away.
"""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import WeightsError

LEGACY_HEADER = [0x1950A86A20F9469CFC6C, 1001]  # magic number, protocol
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")  # of a moving average of the weights
WEIGHT_KEYS = (  # of the weights in a training checkpoint
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module"),
)
CLASS_INDEX_KEYS, CLASS_LIST_KEYS = ("class_to_idx",), ("classes", "class_names", "idx_to_class")
ARCHITECTURE_KEYS = ("model", "model_name", "architecture", "arch")
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

KEYS = (str, int, float, bool, type(None))  # types of the keys of mappings that are kept

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
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.BINBYTES, pickle.SHORT_BINBYTES),
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


class Placeholder:
    """An object of an unknown class. Calling it, as a pickle does to create an object, gives another placeholder.

    Attributes:
        name: Module and name of the class or function.
        state: What the pickle would set its attributes to.
    """

    def __init__(self, name: str) -> None:
        """Start without a state."""
        self.name = name
        self.state: Any = None

    def __call__(self, *_: Any) -> "Placeholder":
        """Stand for the object that the class or function would have made."""
        return Placeholder(self.name)


class StateDict(NamedTuple):
    """The weights of a checkpoint, and what it says about them.

    Attributes:
        tensors: Arrays by name, in the file's order and dtypes; bfloat16 comes as float32.
        is_ema: Whether they are a moving average, which is taken where a checkpoint has one.
        class_names: The classes in the order of the outputs; empty if the checkpoint has no list.
        hints: Names of the architecture in the checkpoint, the surest first.
    """

    tensors: dict[str, np.ndarray]
    is_ema: bool = False
    class_names: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


def read_torch(path: str | Path) -> StateDict:
    """Read a saved state dict, a training checkpoint that holds one, or a whole saved model.

    Args:
        path: A file that `torch.save` wrote.

    Raises:
        WeightsError: The file cannot be read, is damaged, or holds no tensors by name.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            saved, tensors, data = _read_zip(file, size) if zipfile.is_zipfile(file) else _read_legacy(file, size)
        arrays = {name: _array(tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}
        return StateDict(arrays, _state_dict(saved)[1], _class_names(saved), _architectures(saved))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # bytes that are no pickle may fail in any way that Python knows
        raise WeightsError(
            f"{path}: is not a torch weights file, or is damaged ({type(error).__name__}: {error})"
        ) from None


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, Tensor], dict[str, bytes]]:
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
            saved = machine.load()
        tensors = _tensors(saved, machine.storages, size)
        # The state of an optimizer, which may take twice as much, is left in the file.
        needed = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        data = {key: _check_length(archive.read(f"{folder}data/{key}"), storage) for key, storage in needed.items()}
        return saved, tensors, data


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, Tensor], dict[str, bytes]]:
    file.seek(0)
    if [_Unpickler(file).load(), _Unpickler(file).load()] != LEGACY_HEADER:
        raise WeightsError("is not a torch weights file")
    if not _Unpickler(file).load()["little_endian"]:
        raise WeightsError("was saved on a big-endian machine, which is not supported")
    machine = _Unpickler(file)
    saved = machine.load()
    tensors = _tensors(saved, machine.storages, size)
    needed = {tensor.storage.key for tensor in tensors.values()}
    data = {}
    for key in _Unpickler(file).load():
        if not isinstance(key, str) or key not in machine.storages:
            raise WeightsError("is damaged: it holds a storage that no tensor uses")
        storage = machine.storages[key]
        (numbers,) = struct.unpack("<q", file.read(8))
        if numbers != storage.numbers:
            raise WeightsError(f"is damaged: storage {key} has {numbers} numbers and should have {storage.numbers}")
        if key in needed:
            data[key] = _check_length(file.read(storage.bytes), storage)
        elif file.seek(storage.bytes, os.SEEK_CUR) > size:
            raise WeightsError("is cut off: its tensors need more bytes than it has")
    return saved, tensors, data


def _tensors(saved: Any, storages: dict[str, Storage], file_size: int) -> dict[str, Tensor]:
    """Pick the state dict out of what was saved.

    Having made sure that reading it takes no more memory than the file accounts for.
    """
    tensors, _ = _state_dict(saved)
    if not tensors:
        keys = [str(key) for key in saved][:12] if isinstance(saved, Mapping) else []
        found = f" (its keys: {', '.join(keys)})" if keys else ""
        raise WeightsError(f"holds no tensors by name{found}; {REMEDY}")
    if sum(storage.bytes for storage in storages.values()) > file_size:
        raise WeightsError("is cut off: its tensors need more bytes than it has")
    if sum(math.prod(tensor.shape) for tensor in tensors.values()) > 4 * file_size:
        raise WeightsError("is damaged: its tensors overlap")
    return tensors


def _state_dict(saved: Any) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors by name, and whether they are a moving average."""
    for level in _levels(saved):
        for key in (*EMA_KEYS, *WEIGHT_KEYS):
            tensors = _named_tensors(level.get(key))
            if tensors:
                return tensors, key in EMA_KEYS
    return _named_tensors(saved), False


def _levels(saved: Any) -> Iterator[Mapping[Any, Any]]:
    """Yield a checkpoint and the mappings right in it, such as {"checkpoint": {"model": ...}}."""
    if isinstance(saved, Mapping):
        yield saved
        yield from (value for value in saved.values() if isinstance(value, Mapping))


def _named_tensors(value: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of a module that was saved whole."""
    if isinstance(value, Mapping):
        return {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, Tensor)}
    found: dict[str, Tensor] = {}
    modules, seen = [("", value)], set[int]()
    while modules:
        prefix, module = modules.pop()
        state = module.state if isinstance(module, Placeholder) else None
        if not isinstance(state, Mapping) or id(module) in seen:
            continue
        seen.add(id(module))  # or modules within themselves, or shared by many, would never end
        for part in ("_parameters", "_buffers"):
            tensors = state.get(part)
            found |= {
                prefix + n: t for n, t in (_named_tensors(tensors) if isinstance(tensors, Mapping) else {}).items()
            }
        children = state.get("_modules")
        modules += [(f"{prefix}{n}.", m) for n, m in children.items()] if isinstance(children, Mapping) else []
    return found


def _class_names(saved: Any) -> tuple[str, ...]:
    for level in _levels(saved):
        for key in (*CLASS_INDEX_KEYS, *CLASS_LIST_KEYS):
            names = level.get(key)
            if isinstance(names, Mapping):
                pairs = [(i, name) if key in CLASS_LIST_KEYS else (name, i) for i, name in names.items()]
                by_index = {i: name for i, name in pairs if isinstance(i, int) and isinstance(name, str)}
                names = [by_index[i] for i in sorted(by_index)] if sorted(by_index) == list(range(len(pairs))) else ()
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return ()


def _architectures(saved: Any) -> tuple[str, ...]:
    """Return what the arguments of the training script, or the checkpoint itself, call the architecture."""
    found = []
    for level in _levels(saved):
        arguments = [value.state for value in level.values() if isinstance(value, Placeholder)]
        for values in (*arguments, level):
            named = [values.get(key) for key in ARCHITECTURE_KEYS] if isinstance(values, Mapping) else []
            found += [name for name in named if isinstance(name, str)]
    return tuple(found)


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
            ("collections", "defaultdict"): lambda *_: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
        }
        return known.get((module, name)) or Placeholder(f"{module}.{name}")

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
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict):
            raise WeightsError("is damaged: it holds items of what is no mapping")
        # Other keys, such as tuples, name no tensor, and the hash of a tuple of tuples can take years.
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) in KEYS)

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise WeightsError("is damaged: it holds elements of what is no list")

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_empty_set(self) -> None:
        self.stack.append([])  # a list, as elements are not hashed

    def load_frozenset(self) -> None:
        self.stack.append(self.pop_mark())

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.stack.append(kind(*arguments))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name, which nothing here takes
        self.load_newobj()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        # Of others it is the attribute _metadata of a state dict: module versions, of no use here.

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in INSTRUCTIONS} | {  # type: ignore[assignment]
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_appends,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
    }


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
