"""Weight files of every make, read into one form: arrays by the layer names of `pipeline.models.efficientnet`.

| file      | what it is                                                                                      |
|-----------|-------------------------------------------------------------------------------------------------|
| .h5       | Keras weights: the older layout by layer name, alone or in a saved model; Keras 3's .weights.h5   |
| .keras    | a saved model, loaded in Keras's safe mode                                                        |
| .pth, .pt | a state dict in the naming of efficientnet-pytorch or of timm                                     |

Nothing is ever unpickled or executed. timm's own weights, unlike its `tf_` ones, were trained with a batch normalisation epsilon of 1e-5
and symmetric padding, which no file tells: they fit, and want some fine-tuning.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import keras
import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER, block_name, stage_repeats
from pipeline.models.variants import VARIANTS, Variant
from pipeline.models.weights.torch_checkpoint import read_torch

SUFFIXES = (".h5", ".hdf5", ".keras", ".pth", ".pt")
MAX_ARRAY_BYTES = 2**30  # the largest kernel of the family, L2's classifier, has 22 MB

Arrays = dict[str, list[np.ndarray]]  # by layer name, in the order of the layer's weights; channels last


def read_weights(path: Path, variant: Variant) -> Arrays:
    """Reads a file of weights.

    Args:
        path: The file; its suffix tells its make.
        variant: What the weights are meant for. Files that number their blocks through say nothing of the stages; this breaks the tie
            where no published variant has their number of blocks.

    Returns:
        The arrays of every layer that has weights. Names that are not understood are kept as they stand in the file.

    Raises:
        WeightsError: The suffix is unknown, or the file is damaged or not of the make that its suffix says.
    """
    match path.suffix.lower():
        case ".h5" | ".hdf5":
            return _read_h5(path)
        case ".keras":
            return _read_keras(path)
        case ".pth" | ".pt":
            return _rename(read_torch(path), variant)
    raise WeightsError(f"{path}: weights come in {', '.join(SUFFIXES)} files")


def _read_keras(path: Path) -> Arrays:
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


def _read_h5(path: Path) -> Arrays:
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
    found: dict[str, list[h5py.Dataset]] = {}

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if (
            path.startswith("layers/")
            and path.endswith("/vars")
            and "name" in item.attrs
            and not path.endswith("seed_generator/vars")
        ):
            found[str(item.attrs["name"])] = [item[key] for key in sorted(item, key=int)]

    root.visititems(visit)
    if not found:
        raise WeightsError("names no layers; load it with the Keras that wrote it and save a .keras file")
    return found


def _array(dataset: h5py.Dataset) -> np.ndarray:
    if dataset.nbytes > MAX_ARRAY_BYTES:
        raise WeightsError(f"{dataset.name} claims {dataset.nbytes} bytes")
    return np.asarray(dataset)


# --- Names of PyTorch's implementations --------------------------------------------------------------------------------------------

LEAVES = ("weight", "bias", "running_mean", "running_var")  # in the order of Keras's weights
ENDS = {
    **{
        "_conv_stem": "stem_conv",
        "_bn0": "stem_bn",
        "_conv_head": "top_conv",
        "_bn1": "top_bn",
        "_fc": CLASSIFIER,
    },  # efficientnet-pytorch
    **{
        "conv_stem": "stem_conv",
        "bn1": "stem_bn",
        "conv_head": "top_conv",
        "bn2": "top_bn",
        "classifier": CLASSIFIER,
    },  # timm
}
EFFICIENTNET_PYTORCH = {
    **{"_expand_conv": "expand_conv", "_bn0": "expand_bn", "_depthwise_conv": "dwconv", "_bn1": "bn"},
    **{"_se_reduce": "se_reduce", "_se_expand": "se_expand", "_project_conv": "project_conv", "_bn2": "project_bn"},
}
TIMM_SE = {"se.conv_reduce": "se_reduce", "se.conv_expand": "se_expand"}
TIMM = {
    "conv_pw": "expand_conv",
    "bn1": "expand_bn",
    "conv_dw": "dwconv",
    "bn2": "bn",
    "conv_pwl": "project_conv",
    "bn3": "project_bn",
} | TIMM_SE
TIMM_UNEXPANDED = {"conv_dw": "dwconv", "bn1": "bn", "conv_pw": "project_conv", "bn2": "project_bn"} | TIMM_SE


def _rename(tensors: Mapping[str, np.ndarray], variant: Variant) -> Arrays:
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, leaf = name.removeprefix("module.").rpartition(".")
        if leaf in LEAVES:
            modules[module][leaf] = tensor

    numbered = len({match[1] for name in modules if (match := re.match(r"_blocks\.(\d+)\.", name))})
    repeats = next((r for v in (variant, *VARIANTS.values()) if sum(r := stage_repeats(v)) == numbered), [])
    blocks = [block_name(stage, repeat) for stage, count in enumerate(repeats, 1) for repeat in range(count)]

    def layer_name(module: str) -> str:
        if (match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)) and int(match[1]) < len(blocks):
            part = EFFICIENTNET_PYTORCH.get(match[2])
            return f"{blocks[int(match[1])]}_{part}" if part else module
        if match := re.fullmatch(r"(blocks\.(\d+)\.(\d+))\.([\w.]+)", module):
            part = (TIMM if f"{match[1]}.conv_pwl" in modules else TIMM_UNEXPANDED).get(match[4])
            return f"{block_name(int(match[2]) + 1, int(match[3]))}_{part}" if part else module
        return ENDS.get(module, module)

    return {
        layer_name(module): [_channels_last(module, leaves[leaf]) for leaf in LEAVES if leaf in leaves]
        for module, leaves in modules.items()
    }


def _channels_last(module: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim == 4:
        return (
            tensor.transpose(2, 3, 0, 1)
            if module.endswith(("_depthwise_conv", "conv_dw"))
            else tensor.transpose(2, 3, 1, 0)
        )
    return tensor.T
