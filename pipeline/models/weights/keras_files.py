"""Weight files of Keras: `.h5` weights, alone or in a saved model, Keras 3's `.weights.h5`, and `.keras` archives."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import keras
import numpy as np

from pipeline.errors import WeightsError

MAX_ARRAY_BYTES = 2**30  # the largest kernel of the family, L2's classifier, has 22 MB


def read_keras_archive(path: Path) -> dict[str, list[np.ndarray]]:
    """Load a `.keras` file in Keras's safe mode and return the arrays of each layer, nested models included.

    Raises:
        WeightsError: The file is not a Keras model, or is damaged.
    """
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a damaged or hostile file brings about
        raise WeightsError(
            f"{path}: cannot be loaded as a Keras model ({type(error).__name__}: {str(error)[:300]})"
        ) from None
    return {layer.name: [np.asarray(w) for w in layer.weights] for layer in _leaf_layers(model) if layer.weights}


def _leaf_layers(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaf_layers(layer)
        else:
            yield layer


def read_keras_h5(path: Path) -> dict[str, list[np.ndarray]]:
    """Read an HDF5 weight file, by layer name as Keras 2 wrote it or by variable path as Keras 3 does.

    Raises:
        WeightsError: The file is not a Keras weights file, or is damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)  # where a saved model keeps them
            layers = _legacy_layers(root) if "layer_names" in root.attrs else _keras3_layers(root)
            return {name: [_array(dataset) for dataset in datasets] for name, datasets in layers.items() if datasets}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever HDF5 makes of damaged bytes
        raise WeightsError(f"{path}: is not a Keras weights file, or is damaged ({error})") from None


def _legacy_layers(root: h5py.Group) -> dict[str, list[h5py.Dataset]]:
    def names(group: h5py.Group, key: str) -> list[str]:
        return [name.decode() if isinstance(name, bytes) else name for name in group.attrs[key]]

    return {
        layer: [root[layer][weight] for weight in names(root[layer], "weight_names")]
        for layer in names(root, "layer_names")
    }


def _keras3_layers(root: h5py.Group) -> dict[str, list[h5py.Dataset]]:
    """Keras 3 files groups by class (`layers/conv2d_7/vars/0`) and notes the layer's name as an attribute."""
    layers: dict[str, list[h5py.Dataset]] = {}

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if (
            path.startswith("layers/")
            and path.endswith("/vars")
            and "name" in item.attrs
            and not path.endswith("seed_generator/vars")
        ):
            layers[str(item.attrs["name"])] = [item[key] for key in sorted(item, key=int)]

    root.visititems(visit)
    if not layers:
        raise WeightsError("names no layers; load it with the Keras that wrote it and save a .keras file")
    return layers


def _array(dataset: h5py.Dataset) -> np.ndarray:
    if dataset.nbytes > MAX_ARRAY_BYTES:
        raise WeightsError(f"{dataset.name} claims {dataset.nbytes} bytes")
    return np.asarray(dataset)
