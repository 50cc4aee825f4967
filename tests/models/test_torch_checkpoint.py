"""PyTorch files, written here byte by byte, since there is no torch to write them."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import WeightsError
from pipeline.models.weights.torch_checkpoint import read_torch

KINDS = {"f4": "Float", "f2": "Half", "f8": "Double", "i8": "Long", "i4": "Int", "u1": "Byte", "b1": "Bool"}


class _Global:
    """Pickles as a reference to a name that need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Storage:
    def __init__(self, kind: str, key: str, data: bytes, numbers: int) -> None:
        self.kind, self.key, self.data, self.numbers = kind, key, data, numbers


class _Call:
    """Pickles as a function applied to arguments."""

    def __init__(self, function: _Global, *args: Any, state: Any = None) -> None:
        self.function, self.args, self.state = function, args, state


class _Writer(pickle._Pickler):
    """torch.save's pickles: storages by persistent id, tensors as calls of torch's functions."""

    def __init__(self, file: Any, *, legacy: bool, protocol: int = 2) -> None:
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, dict[str, _Storage]()

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        self.storages[obj.key] = obj
        return ("storage", _Global("torch", f"{obj.kind}Storage"), obj.key, "cpu", obj.numbers) + (
            (None,) if self.legacy else ()
        )

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def tensor(
    array: np.ndarray, key: str, *, whole: np.ndarray | None = None, offset: int = 0, kind: str | None = None
) -> _Call:
    """A tensor; `whole` is the storage that `array` is a view of."""
    whole = np.ascontiguousarray(array) if whole is None else whole
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = _Storage(kind or KINDS[array.dtype.str[1:]], key, whole.tobytes(), whole.size)
    return _Call(
        _Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, array.shape, strides, False, OrderedDict()
    )


def torch_zip(
    saved: Any,
    folder: str = "archive",
    protocol: int = 2,
    byteorder: str = "little",
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    stream = io.BytesIO()
    writer = _Writer(stream, legacy=False, protocol=protocol)
    writer.dump(saved)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", stream.getvalue())
        archive.writestr(f"{folder}/byteorder", byteorder)
        for key, storage in writer.storages.items():
            archive.writestr(f"{folder}/data/{key}", storage.data)
        archive.writestr(f"{folder}/version", "3\n")
    return file.getvalue()


def torch_legacy(saved: Any, little_endian: bool = True) -> bytes:
    stream = io.BytesIO()
    sizes = {"short": 2, "int": 4, "long": 4}
    for header in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": sizes},
    ):
        pickle.dump(header, stream, protocol=2)
    writer = _Writer(stream, legacy=True)
    writer.dump(saved)
    pickle.dump(sorted(writer.storages), stream, protocol=2)
    for _, storage in sorted(writer.storages.items()):
        stream.write(struct.pack("<q", storage.numbers) + storage.data)
    return stream.getvalue()


FORMATS = pytest.mark.parametrize("write", [torch_zip, torch_legacy])
RANDOM = np.random.default_rng(0)
ARRAYS = {
    "stem.weight": RANDOM.normal(size=(4, 3, 3, 3)).astype("f4"),
    "bn.half": RANDOM.normal(size=5).astype("f2"),
    "bn.double": RANDOM.normal(size=(2, 2)),
    "bn.num_batches_tracked": np.array(7, "i8"),
    "empty": np.zeros((0, 3), "f4"),
    "flags": np.array([True, False]),
}


def saved_arrays() -> OrderedDict[str, Any]:
    return OrderedDict((name, tensor(array, str(i))) for i, (name, array) in enumerate(ARRAYS.items()))


def read_bytes(data: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "weights.pth"
    path.write_bytes(data)
    return read_torch(path).tensors


@FORMATS
def test_tensors_come_back_by_name_order_shape_and_dtype(write: Any, tmp_path: Path) -> None:
    tensors = read_bytes(write(saved_arrays()), tmp_path)
    assert list(tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_a_zip_of_pickle_protocol_four_under_any_folder_is_read(tmp_path: Path) -> None:
    tensors = read_bytes(torch_zip(saved_arrays(), folder="lite0-57934424", protocol=4), tmp_path)
    np.testing.assert_array_equal(tensors["stem.weight"], ARRAYS["stem.weight"])


@FORMATS
def test_views_with_offsets_and_strides_share_a_storage(write: Any, tmp_path: Path) -> None:
    whole = np.arange(24, dtype="f4").reshape(4, 6)
    saved = {
        "transposed": tensor(whole.T, "0", whole=whole),
        "part": tensor(whole[1:3, ::2], "0", whole=whole, offset=6),
        "last": tensor(whole[3, 5:], "0", whole=whole, offset=23),
    }
    tensors = read_bytes(write(saved), tmp_path)
    np.testing.assert_array_equal(tensors["transposed"], whole.T)
    np.testing.assert_array_equal(tensors["part"], whole[1:3, ::2])
    np.testing.assert_array_equal(tensors["last"], [23])


@FORMATS
def test_bfloat16_comes_as_float32(write: Any, tmp_path: Path) -> None:
    exact = np.array([[1.0, -2.5], [0.15625, 3e38]], "f4")
    upper = (exact.view("u4") >> 16).astype("u2")
    tensors = read_bytes(write({"w": tensor(upper, "0", kind="BFloat16")}), tmp_path)
    assert tensors["w"].dtype == np.float32
    np.testing.assert_array_equal(tensors["w"], (upper.astype("u4") << 16).view("f4"))


@FORMATS
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_the_weights_of_a_training_checkpoint_are_found(write: Any, key: str, tmp_path: Path) -> None:
    saved = {
        "epoch": 3,
        "arch": "b0",
        "lr": 0.5,
        "optimizer": {"state": {0: {"step": 9}}, "groups": [(1, 2.5, None, True)]},
        key: saved_arrays(),
    }
    assert list(read_bytes(write(saved), tmp_path)) == list(ARRAYS)


@FORMATS
def test_parameters_and_the_metadata_of_a_state_dict_are_understood(write: Any, tmp_path: Path) -> None:
    weight = np.ones((2, 3), "f4")
    parameter = _Call(_Global("torch._utils", "_rebuild_parameter"), tensor(weight, "0"), True, OrderedDict())
    metadata = {"_metadata": OrderedDict({"": {"version": 1}})}

    inner = _Call(_Global("collections", "OrderedDict"), state=metadata)
    saved = {"state_dict": {"w": parameter, "inner": inner}}
    np.testing.assert_array_equal(read_bytes(write(saved), tmp_path)["w"], weight)


@FORMATS
@pytest.mark.parametrize(
    "function",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("pathlib", "Path.touch"),
        ("torch.serialization", "load"),
        ("numpy", "fromfile"),
    ],
)
def test_a_call_of_anything_else_is_not_made_and_no_obstacle(
    write: Any, function: tuple[str, str], tmp_path: Path
) -> None:
    witness = tmp_path / "executed"
    saved = {"w": tensor(np.ones(2, "f4"), "0"), "x": _Call(_Global(*function), f"touch {witness}")}
    assert list(read_bytes(write(saved), tmp_path)) == ["w"]
    assert not witness.exists()


@FORMATS
def test_what_a_training_script_saves_beside_the_weights_is_no_obstacle(write: Any, tmp_path: Path) -> None:
    """Objects of unknown classes, containers of any kind, and keys that are no names."""
    arguments = _Call(_Global("argparse", "Namespace"), state={"model": "tf_efficientnet_b0", "lr": 0.1})
    path = tmp_path / "checkpoint.pth"
    beside = {
        "args": arguments,
        "best": _Call(_Global("numpy.core.multiarray", "scalar"), _Call(_Global("numpy", "dtype"), "f8"), b"abc"),
        "when": _Call(_Global("datetime", "datetime"), b"1234567890"),
        "history": _Call(_Global("collections", "defaultdict"), _Global("builtins", "list")),
        "tuples": {(1, 2): 3, 0.5: 4, None: 5},
        "large": 2**70,
        "set": _Call(_Global("builtins", "set"), [1, 2]),
        "optimizer": {"state": {0: {"exp_avg": tensor(np.ones((64, 64), "f4"), "moment")}}},
    }
    path.write_bytes(write({**beside, "state_dict": saved_arrays()}))
    state = read_torch(path)
    assert list(state.tensors) == list(ARRAYS)
    assert state.hints == ("tf_efficientnet_b0",)


@FORMATS
@pytest.mark.parametrize(
    "keys", [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("ema", "model")], ids=lambda keys: keys[0]
)
def test_a_moving_average_is_taken_before_the_last_weights(write: Any, keys: tuple[str, str], tmp_path: Path) -> None:
    last, average = ({"w": tensor(np.full(2, value, "f4"), str(value))} for value in (1, 2))
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(write({keys[1]: last, keys[0]: average}))
    state = read_torch(path)
    assert state.is_ema
    np.testing.assert_array_equal(state.tensors["w"], [2, 2])


@FORMATS
@pytest.mark.parametrize("key", ["model_state_dict", "net", "params", "weights", "checkpoint"])
def test_weights_are_found_under_every_usual_key(write: Any, key: str, tmp_path: Path) -> None:
    saved: Any = saved_arrays()
    assert list(read_bytes(write({"epoch": 1, key: {"model": saved} if key == "checkpoint" else saved}), tmp_path)) == [
        *ARRAYS
    ]


def test_the_keys_of_a_checkpoint_without_weights_are_listed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tensors by name \(its keys: epoch, history\)"):
        read_bytes(torch_zip({"epoch": 3, "history": [1.0]}), tmp_path)


@pytest.mark.parametrize(
    "listed",
    [{"class_to_idx": {"bee": 1, "ant": 0}}, {"classes": ["ant", "bee"]}, {"idx_to_class": {1: "bee", 0: "ant"}}],
)
def test_the_classes_of_a_checkpoint_come_in_the_order_of_its_outputs(listed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(torch_zip({"state_dict": saved_arrays(), **listed}))
    assert read_torch(path).class_names == ("ant", "bee")


def test_a_model_that_was_saved_whole_gives_its_state_dict(tmp_path: Path) -> None:
    def module(parameters: dict[str, Any], **children: Any) -> _Call:
        state = {"_parameters": parameters, "_buffers": {}, "_modules": children, "training": False}
        return _Call(_Global("timm.models.efficientnet", "EfficientNet"), state=state)

    inner = module({"weight": tensor(np.ones(3, "f4"), "0")})
    tensors = read_bytes(torch_zip(module({"scale": tensor(np.zeros(2, "f4"), "1")}, conv_stem=inner)), tmp_path)
    assert {name: array.shape for name, array in tensors.items()} == {"scale": (2,), "conv_stem.weight": (3,)}


class _Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("protocol", range(6))
def test_an_ordinary_malicious_pickle_is_refused(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError):
        read_bytes(pickle.dumps(_Exploit(), protocol=protocol), tmp_path)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x05\x96" + struct.pack("<q", 2**40) + b".",  # a bytearray of 1 TB
        # a key that hashes for years
        b"\x80\x02K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"}h\x3cK\x01s.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",
        b"\x82\x01.",
        b"(ios\nsystem\n.",
    ],
)
@pytest.mark.timeout(20)
def test_pickles_that_exhaust_memory_or_time_are_refused(code: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        read_bytes(code, tmp_path)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(WeightsError):
        read_bytes(file.getvalue(), tmp_path)


def _view(storage_numbers: int, offset: Any, shape: Any, strides: Any) -> _Call:
    storage = _Storage("Float", "0", bytes(4 * storage_numbers), storage_numbers)
    return _Call(_Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, OrderedDict())


@FORMATS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**9, 10**9), (0, 0)),
        (0, (2,), (1, 1)),
        (0, (2.0,), (1,)),
        (0, [2], [1]),
        (0, (-1, -4), (1, 1)),
        (0, (1,) * 40, (1,) * 40),
        (True, (2,), (1,)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(
    write: Any, offset: Any, shape: Any, strides: Any, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"weights\.pth: is damaged"):
        read_bytes(write({"w": _view(4, offset, shape, strides)}), tmp_path)


def test_many_copies_of_one_storage_are_refused(tmp_path: Path) -> None:
    whole = np.ones(50_000, "f4")
    saved = {str(i): tensor(whole, "0") for i in range(100)}
    with pytest.raises(WeightsError, match="overlap"):
        read_bytes(torch_zip(saved), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch_zip(saved_arrays(), byteorder="big"), "big-endian"),
        (torch_legacy(saved_arrays(), little_endian=False), "big-endian"),
        (torch_zip(saved_arrays(), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (torch_zip({"epoch": 3}), "no tensors by name"),
        (torch_legacy([1, 2]), "no tensors by name"),
        (b"", "is not a torch weights file"),
        (b"<html>404</html>", "is not a torch weights file"),
        (pickle.dumps({"a": 1}, protocol=2), "is not a torch weights file"),
    ],
)
def test_other_files_are_refused_with_the_reason(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"weights\.pth: .*{message}"):
        read_bytes(data, tmp_path)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"not one of torch\.save"):
        read_bytes(file.getvalue(), tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth: cannot be read \(No such file"):
        read_torch(tmp_path / "nowhere.pth")


ANYWHERE = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = {write: write(saved_arrays()) for write in (torch_zip, torch_legacy)}


@FORMATS
@given(share=st.floats(0, 1, exclude_max=True))
@ANYWHERE
def test_a_truncated_file_is_refused(write: Any, share: float, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        read_bytes(WHOLE[write][: int(share * len(WHOLE[write]))], tmp_path)


@given(st.binary(max_size=200))
@example(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
@ANYWHERE
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    for content in (data, WHOLE[torch_legacy][:100] + data):
        with pytest.raises(WeightsError, match=r"weights\.pth"):
            read_bytes(content, tmp_path)


@FORMATS
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@ANYWHERE
def test_a_changed_byte_gives_arrays_or_a_weights_error(write: Any, position: float, byte: int, tmp_path: Path) -> None:
    data = bytearray(WHOLE[write])
    data[int(position * len(data))] = byte
    try:
        tensors = read_bytes(bytes(data), tmp_path)
    except WeightsError:
        return
    assert all(isinstance(array, np.ndarray) for array in tensors.values())
