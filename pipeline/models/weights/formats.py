"""Weight files of every format, recognized by their content and read into one form.

| format        | content                                                    | usual suffixes          |
|---------------|------------------------------------------------------------|-------------------------|
| HDF5          | Keras 2 and 3: weights, alone or in a saved model          | .h5, .hdf5, .weights.h5 |
| Keras archive | a saved model of Keras 2 or 3                              | .keras                  |
| torch         | a state dict, a training checkpoint, or a whole model      | .pth, .pt, .bin, .ckpt  |
| safetensors   | a state dict                                               | .safetensors            |

Nothing is ever unpickled, built or executed.
"""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import WeightsError
from pipeline.models.variants import Variant
from pipeline.models.weights.keras_files import read_keras_archive, read_keras_h5
from pipeline.models.weights.safetensors_file import read_safetensors
from pipeline.models.weights.torch_checkpoint import StateDict, read_torch
from pipeline.models.weights.torch_names import to_keras_layers
from pipeline.models.weights.weights_file import WeightsFile

HEAD_BYTES = 1024
AGAIN = "download or copy it again"


def _from_state_dict(path: Path, state: StateDict, variant: Variant) -> WeightsFile:
    try:
        layers, naming = to_keras_layers(state.tensors, variant)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return WeightsFile(layers, naming, state.hints, state.class_names, state.is_ema)


def _read_torch(path: Path, variant: Variant) -> WeightsFile:
    return _from_state_dict(path, read_torch(path), variant)


def _read_safetensors(path: Path, variant: Variant) -> WeightsFile:
    return _from_state_dict(path, StateDict(read_safetensors(path)), variant)


FORMATS: dict[str, Callable[[Path, Variant], WeightsFile]] = {  # by what `detect_format` says
    "hdf5": read_keras_h5,
    "keras": read_keras_archive,
    "torch": _read_torch,
    "safetensors": _read_safetensors,
}
MISTAKES = {  # beginnings of files that are often given for weights
    b"version https://git-lfs": "is a Git LFS pointer, not the weights themselves; fetch them with: git lfs pull",
    b"\xff\xd8\xff": "is a JPEG image, not weights",
    b"\x89PNG": "is a PNG image, not weights",
    b"\x1f\x8b": "is compressed by gzip; unpack it",
}


def detect_format(path: Path) -> str:
    """Return the format of a file, a key of `FORMATS`.

    Raises:
        WeightsError: The file is of no known format, or is cut off. The message says what it is, as far as known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    text = head.lstrip().lower()
    if not head:
        raise WeightsError(f"{path}: is empty; {AGAIN}")
    for start, reason in MISTAKES.items():
        if head.startswith(start):
            raise WeightsError(f"{path}: {reason}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path}: is a web page, not weights: the download went wrong; {AGAIN}")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        return _detect_in_zip(path)
    if head.startswith(b"\x80"):
        return "torch"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= max(size, 10**8):
        return "safetensors"
    if path.suffix.lower() == ".onnx" or (
        head.startswith(b"\x08") and (b"pytorch" in head[:64] or b"onnx" in head[:64])
    ):
        raise WeightsError(
            f"{path}: is an ONNX model: an export format, not weights to train; take its source's weights"
        )
    raise WeightsError(f"{path}: is no weight file: known are Keras's (.h5, .keras), PyTorch's and safetensors")


def _detect_in_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise WeightsError(f"{path}: is cut off or damaged: the end of the archive is missing; {AGAIN}") from None
    if "model.weights.h5" in names:
        return "keras"
    if any(name.endswith(("/constants.pkl", "/code/")) or "/code/__torch__" in name for name in names):
        raise WeightsError(
            f"{path}: is TorchScript, a program; in torch, torch.save(torch.jit.load(FILE).state_dict(), ...) writes "
            "its weights"
        )
    return "torch"


def read_weights(path: Path, variant: Variant) -> WeightsFile:
    """Read a weight file, whatever its suffix.

    Args:
        path: The file.
        variant: What the weights are meant for; resolves the stages of files that number their blocks through.

    Returns:
        The arrays of every layer that has weights, and what the file says about its network.

    Raises:
        WeightsError: The file is of no known format, or is damaged.
    """
    return FORMATS[detect_format(path)](path, variant)
