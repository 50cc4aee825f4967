"""Weight files of Keras 2 and 3: `.h5` weights, alone or in a saved model, `.weights.h5`, and `.keras` archives.

The arrays are read from the HDF5 file, and what the network does to its input from the config beside them. No model is
built, so that Lambda layers and classes of the user's own do no harm and are no obstacle.
"""

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER
from pipeline.models.variants import NORMALIZATIONS, Variant
from pipeline.models.weights.keras_config import NetworkConfig, compose, read_network_config
from pipeline.models.weights.weights_file import Arrays, WeightsFile, numbered_blocks

MAX_ARRAY_BYTES = 2**30  # the largest kernel of the family, L2's classifier, has 22 MB
MAX_CONFIG_BYTES = 2**26
MAX_INFLATION = 20  # of compressed data; random float32 numbers have about 1.1
CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # groups of the layers of a model, in a .weights.h5
LEAF_ORDER = ("gamma", "depthwise_kernel", "kernel", "beta", "bias", "mean", "moving_mean", "variance")
QUBVEL_CLASSIFIER = "probs"


def read_keras_archive(path: Path, variant: Variant) -> WeightsFile:
    """Read a `.keras` file: a zip archive of a config and an HDF5 file.

    Args:
        path: The file.
        variant: What the weights are meant for.

    Raises:
        WeightsError: The file is not a Keras model, or is damaged, or unpacks to far more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.getinfo(name) for name in ("config.json", "model.weights.h5")}
            for name, info in members.items():
                limit = MAX_CONFIG_BYTES if name == "config.json" else MAX_INFLATION * (info.compress_size + 2**20)
                if info.file_size > limit:
                    raise WeightsError(f"{name} unpacks to {info.file_size:,} bytes, more than a model's can")
            config = json.loads(archive.read("config.json"))
            weights = archive.read("model.weights.h5")
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever damaged bytes bring about
        raise WeightsError(f"{path}: is not a .keras file, or is damaged ({error})") from None
    return _read(path, io.BytesIO(weights), len(weights), config, variant)


def read_keras_h5(path: Path, variant: Variant) -> WeightsFile:
    """Read an HDF5 file: weights alone, or a saved model.

    Args:
        path: The file.
        variant: What the weights are meant for.

    Raises:
        WeightsError: The file is not a Keras weights file, or is damaged.
    """
    return _read(path, path, path.stat().st_size, None, variant)


def _read(path: Path, source: Path | io.BytesIO, size: int, config: Any, variant: Variant) -> WeightsFile:
    try:
        with h5py.File(source, "r") as file:
            if config is None and "model_config" in file.attrs:
                config = json.loads(file.attrs["model_config"])
            root = file.get("model_weights", file)  # where a saved model keeps them
            layers = dict(_legacy_layers(root) if "layer_names" in root.attrs else _layers(root, config, variant))
            _check_sizes(file, [dataset for datasets in layers.values() for dataset in datasets], size)
            arrays = {
                name: [np.asarray(dataset) for dataset in datasets] for name, datasets in layers.items() if datasets
            }
            nested = any(container in file for container in CONTAINERS) and "conv2d" not in file.get("layers", ())
        network = None if config is None else read_network_config(config)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever HDF5 makes of damaged bytes
        raise WeightsError(f"{path}: is not a Keras weights file, or is damaged ({error})") from None
    return _describe(arrays, network, nested)


def _describe(arrays: Arrays, network: NetworkConfig | None, nested: bool) -> WeightsFile:
    naming = "qubvel" if QUBVEL_CLASSIFIER in arrays and CLASSIFIER not in arrays else "keras"
    if network is None:  # keras.applications divides by 255, and then normalizes by numbers among the weights
        own = [name for name in arrays if re.fullmatch(r"normalization(_\d+)?", name)]
        normalization = compose((NORMALIZATIONS["unit"], own[0]), arrays) if own else None
        note = "without its config, the file does not tell whether a layer in front of the network rescales the input"
        return WeightsFile(arrays, naming, normalization=normalization, notes=(note,) if nested else ())
    return WeightsFile(
        arrays,
        naming,
        padding=network.padding,
        batch_norm_epsilon=network.batch_norm_epsilon,
        normalization=compose(network.input_steps, arrays) if network.input_steps else None,
        notes=network.notes,
    )


def _check_sizes(file: h5py.File, datasets: list[h5py.Dataset], size: int) -> None:
    """Make sure that reading takes no more memory than the file accounts for, and reads no other file."""
    for dataset in datasets:
        if dataset.nbytes > MAX_ARRAY_BYTES:
            raise WeightsError(f"{dataset.name} claims {dataset.nbytes} bytes")
        if dataset.external or dataset.is_virtual or dataset.file.filename != file.filename:
            raise WeightsError(f"{dataset.name} has its numbers in another file")
    total = sum(dataset.nbytes for dataset in datasets)
    if total > MAX_ARRAY_BYTES + MAX_INFLATION * size:
        raise WeightsError(f"claims {total} bytes of weights")


def _legacy_layers(root: h5py.Group) -> dict[str, list[h5py.Dataset]]:
    """Keras 2 lists layers and weights in attributes. A weight's own name has the layer within a nested model."""

    def names(group: h5py.Group, key: str) -> list[str]:
        return [name.decode() if isinstance(name, bytes) else name for name in group.attrs[key]]

    layers: dict[str, dict[str, h5py.Dataset]] = {}
    for layer in names(root, "layer_names"):
        for weight in names(root[layer], "weight_names"):
            *path, leaf = weight.split("/")
            layers.setdefault(path[-1] if path else layer, {})[leaf.partition(":")[0]] = root[layer][weight]
    return {layer: _in_order(weights) for layer, weights in layers.items()}


def _in_order(weights: dict[str, h5py.Dataset]) -> list[h5py.Dataset]:
    known = {leaf: i for i, leaf in enumerate(LEAF_ORDER)}
    return [weights[leaf] for leaf in sorted(weights, key=lambda leaf: known.get(leaf, len(known)))]


def _layers(root: h5py.Group, config: Any, variant: Variant) -> Iterator[tuple[str, list[h5py.Dataset]]]:
    """Yield the layers of a .weights.h5.

    It files them by class (`layers/conv2d_7/vars/0`). Keras 3 notes the layer's name as an attribute; for Keras 2, it
    follows from the config, or else from the order of the layers of each class.
    """
    container = _container(root)
    if container is None:
        raise WeightsError("names no layers; load it with the Keras that wrote it and save a .keras file")
    named = dict(_named_layers(container))
    if named:
        yield from named.items()
    elif config is not None:
        yield from _layers_by_config(container, config)
    else:
        yield from _layers_by_order(container, variant)


def _container(group: h5py.Group) -> h5py.Group | None:
    return next((group[name] for name in CONTAINERS if isinstance(group.get(name), h5py.Group)), None)


def _variables(group: h5py.Group) -> list[h5py.Dataset]:
    variables = group.get("vars", {})
    return [variables[key] for key in sorted(variables, key=int)]


def _named_layers(container: h5py.Group) -> Iterator[tuple[str, list[h5py.Dataset]]]:
    for key, group in container.items():
        if not isinstance(group, h5py.Group) or key.startswith("seed_generator"):
            continue
        name = group["vars"].attrs.get("name") if "vars" in group else None
        if name is not None and len(group["vars"]):
            yield str(name), _variables(group)
        inner = _container(group)
        if inner is not None:
            yield from _named_layers(inner)


def _layers_by_config(container: h5py.Group, config: Any) -> Iterator[tuple[str, list[h5py.Dataset]]]:
    counts = Counter[str]()
    for layer in config["config"]["layers"]:
        key = _snake_case(layer["class_name"].rpartition(">")[2])
        counts[key] += 1
        group = container.get(f"{key}_{counts[key] - 1}" if counts[key] > 1 else key)
        if group is None:
            continue
        inner = _container(group)
        if inner is not None and "layers" in layer["config"]:
            yield from _layers_by_config(inner, layer)
        elif "vars" in group and len(group["vars"]):
            yield layer["config"]["name"], _variables(group)


def _snake_case(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _layers_by_order(container: h5py.Group, variant: Variant) -> Iterator[tuple[str, list[h5py.Dataset]]]:
    if "depthwise_conv2d" not in container:  # around the network
        for key, group in container.items():
            inner = _container(group)
            if inner is not None:
                yield from _layers_by_order(inner, variant)
            elif "vars" in group and len(group["vars"]):
                yield key, _variables(group)
        return
    depthwise = sum(key.startswith("depthwise_conv2d") for key in container)
    squeezes = sum(re.fullmatch(r"conv2d(_\d+)?", key) is not None for key in container) > 2 * depthwise + 1
    counts = Counter[str]()
    for key, name in _official_order(depthwise, variant, squeezes=squeezes):
        group = container.get(f"{key}_{counts[key]}" if counts[key] else key)
        counts[key] += 1
        if group is not None:
            yield name, _variables(group)
    if "normalization" in container:
        yield "normalization", _variables(container["normalization"])


def _official_order(count: int, variant: Variant, *, squeezes: bool) -> Iterator[tuple[str, str]]:
    """Yield class and name of the layers with weights of keras.applications' network with `count` blocks, in order."""
    yield from (("conv2d", "stem_conv"), ("batch_normalization", "stem_bn"))
    for block in numbered_blocks(count, variant):
        if variant.family.blocks[int(block[5]) - 1].expand != 1:
            yield from (("conv2d", f"{block}_expand_conv"), ("batch_normalization", f"{block}_expand_bn"))
        yield from (("depthwise_conv2d", f"{block}_dwconv"), ("batch_normalization", f"{block}_bn"))
        if squeezes:
            yield from (("conv2d", f"{block}_se_reduce"), ("conv2d", f"{block}_se_expand"))
        yield from (("conv2d", f"{block}_project_conv"), ("batch_normalization", f"{block}_project_bn"))
    yield from (("conv2d", "top_conv"), ("batch_normalization", "top_bn"), ("dense", CLASSIFIER))
