"""PyTorch's names and layouts of EfficientNet's tensors, turned into Keras's, for every naming that is known.

| naming               | stem                           | a block                                       |
|----------------------|--------------------------------|-----------------------------------------------|
| efficientnet-pytorch | _conv_stem                     | _blocks.7._depthwise_conv, numbered through   |
| timm                 | conv_stem                      | blocks.2.1.conv_dw, by stage                  |
| torchvision          | features.0.0                   | features.3.1.block.1.0, by stage              |
| transformers         | embeddings.convolution         | encoder.blocks.7.depthwise_conv.depthwise_conv|
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.errors import WeightsError
from pipeline.models.efficientnet import CLASSIFIER, block_name
from pipeline.models.variants import Variant
from pipeline.models.weights.weights_file import numbered_blocks

LEAVES = ("weight", "bias", "running_mean", "running_var")  # in the order of Keras's weights
Modules = Mapping[str, Mapping[str, np.ndarray]]
Block = tuple[str, str]  # Keras's prefix of the block, and the name within it

EFFICIENTNET_PYTORCH = {
    **{"_expand_conv": "expand_conv", "_bn0": "expand_bn", "_depthwise_conv": "dwconv", "_bn1": "bn"},
    **{"_se_reduce": "se_reduce", "_se_expand": "se_expand", "_project_conv": "project_conv", "_bn2": "project_bn"},
}
TIMM_SE = {"se.conv_reduce": "se_reduce", "se.conv_expand": "se_expand"}
TIMM = {
    **{"conv_pw": "expand_conv", "bn1": "expand_bn", "conv_dw": "dwconv", "bn2": "bn"},
    **{"conv_pwl": "project_conv", "bn3": "project_bn"},
    **TIMM_SE,
}
TIMM_UNEXPANDED = {"conv_dw": "dwconv", "bn1": "bn", "conv_pw": "project_conv", "bn2": "project_bn"} | TIMM_SE
TORCHVISION = {
    **{"0.0": "expand_conv", "0.1": "expand_bn", "1.0": "dwconv", "1.1": "bn"},
    **{"2.fc1": "se_reduce", "2.fc2": "se_expand", "3.0": "project_conv", "3.1": "project_bn"},
}
TORCHVISION_UNEXPANDED = {
    **{"0.0": "dwconv", "0.1": "bn", "1.fc1": "se_reduce", "1.fc2": "se_expand"},
    **{"2.0": "project_conv", "2.1": "project_bn"},
}
TRANSFORMERS = {
    **{"expansion.expand_conv": "expand_conv", "expansion.expand_bn": "expand_bn"},
    **{"depthwise_conv.depthwise_conv": "dwconv", "depthwise_conv.depthwise_norm": "bn"},
    **{"squeeze_excite.reduce": "se_reduce", "squeeze_excite.expand": "se_expand"},
    **{"projection.project_conv": "project_conv", "projection.project_bn": "project_bn"},
}


class Naming(NamedTuple):
    """How a library names the modules of an EfficientNet.

    Attributes:
        ends: Keras's layers by the names of what is in no block.
        block: Finds the number of a block and the rest of the name; with two numbers, stage and repeat.
        parts: Keras's names by the names within a block.
        unexpanded_parts: Those of a block without expansion, where they mean something else.
        expanding: Within a block, a name that only those with expansion have; empty where the names tell.
    """

    ends: Mapping[str, str]
    block: str
    parts: Mapping[str, str]
    unexpanded_parts: Mapping[str, str] = {}
    expanding: str = ""


NAMINGS = {
    "efficientnet-pytorch": Naming(
        {"_conv_stem": "stem_conv", "_bn0": "stem_bn", "_conv_head": "top_conv", "_bn1": "top_bn", "_fc": CLASSIFIER},
        r"_blocks\.(\d+)\.(\w+)",
        EFFICIENTNET_PYTORCH,
    ),
    "timm": Naming(
        {
            **{"conv_stem": "stem_conv", "bn1": "stem_bn", "conv_head": "top_conv", "bn2": "top_bn"},
            "classifier": CLASSIFIER,
        },
        r"blocks\.(\d+)\.(\d+)\.([\w.]+)",
        TIMM,
        TIMM_UNEXPANDED,
        "conv_pwl",
    ),
    "torchvision": Naming(
        {
            **{"features.0.0": "stem_conv", "features.0.1": "stem_bn", "features.8.0": "top_conv"},
            **{"features.8.1": "top_bn", "classifier.1": CLASSIFIER},
        },
        r"features\.(\d+)\.(\d+)\.block\.([\w.]+)",
        TORCHVISION,
        TORCHVISION_UNEXPANDED,
        "3.0",
    ),
    "transformers": Naming(
        {
            **{"embeddings.convolution": "stem_conv", "embeddings.batchnorm": "stem_bn"},
            **{"encoder.top_conv": "top_conv", "encoder.top_bn": "top_bn", "classifier": CLASSIFIER},
        },
        r"encoder\.blocks\.(\d+)\.([\w.]+)",
        TRANSFORMERS,
    ),
}
FUSED_BLOCKS = {  # found in EfficientNetV2's fused blocks, and in none of V1
    "timm": r"(^|\.)blocks\.1\.0\.conv_exp\.weight",
    "torchvision": r"(^|\.)features\.1\.0\.block\.0\.0\.weight",
}


class NamedLayers(NamedTuple):
    """The tensors of a state dict by Keras's layer names, with channels last; unknown names are kept.

    `naming` is a key of `NAMINGS`.
    """

    layers: dict[str, list[np.ndarray]]
    naming: str


def to_keras_layers(tensors: Mapping[str, np.ndarray], variant: Variant) -> NamedLayers:
    """Group the tensors of a state dict by Keras's layer names.

    Wrappers put prefixes in front of the names, such as `module.` and `model.backbone.`: whatever stands in front of
    the stem's name is one.

    Args:
        tensors: Arrays by their PyTorch names.
        variant: What the weights are meant for. Files that number their blocks through do not tell the stages; where
            no published variant has their number of blocks, this variant's stages are taken.

    Raises:
        WeightsError: The names are none of an EfficientNet's, or are those of several networks.
    """
    naming, prefix = _find_naming(tensors)
    spec = NAMINGS[naming]
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        if leaf in LEAVES:
            modules[module][leaf] = tensor
    if naming == "transformers":  # the classifier is beside the network, not in it
        for name in [name for name in modules if name.endswith(".classifier")]:
            modules["classifier"] = modules.pop(name)
    name_of = _layer_names(spec, modules, variant)
    layers = {
        name_of(module): [_channels_last(name_of(module), leaves[leaf]) for leaf in LEAVES if leaf in leaves]
        for module, leaves in modules.items()
    }
    return NamedLayers(layers, naming)


def _find_naming(tensors: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """Return the naming of a state dict and the prefix of its names."""
    found = []
    for naming, spec in NAMINGS.items():
        stem = next(name for name, layer in spec.ends.items() if layer == "stem_conv") + ".weight"
        found += [
            (naming, name.removesuffix(stem))
            for name, tensor in tensors.items()
            if re.search(rf"(^|\.){re.escape(stem)}$", name) and getattr(tensor, "ndim", 0) == 4
        ]
    for naming, pattern in FUSED_BLOCKS.items():
        expanded = [name for name in tensors if re.search(pattern, name)]
        if expanded and (naming == "timm" or tensors[expanded[0]].shape[1] != 1):
            raise WeightsError(f"holds an EfficientNetV2 ({naming}'s names), and the variants here are those of V1")
    averages = [(naming, prefix) for naming, prefix in found if "ema" in re.split(r"[._]", prefix)]
    chosen = averages or found
    if not chosen:
        examples = ", ".join(list(tensors)[:3])
        raise WeightsError(
            f"no layer has a known name (it begins with {examples}); known are the names of {', '.join(NAMINGS)}"
        )
    if len(chosen) > 1:
        prefixes = ", ".join(repr(prefix) for _, prefix in chosen)
        raise WeightsError(f"holds several networks, with the prefixes {prefixes}; save the state dict of one")
    return chosen[0]


def _layer_names(spec: Naming, modules: Modules, variant: Variant) -> Callable[[str], str]:
    """Return the function from a module's name to that of Keras's layer."""
    by_stage = re.compile(spec.block).groups == 3
    numbered = len({match[1] for name in modules if (match := re.fullmatch(spec.block, name))})
    blocks = numbered_blocks(numbered, variant)
    first_stage = 1 if any(name.startswith("features.") for name in spec.ends) else 0  # torchvision's stem counts

    def name_of(module: str) -> str:
        match = re.fullmatch(spec.block, module)
        if match is None:
            return spec.ends.get(module, module)
        if by_stage:
            block = block_name(int(match[1]) + 1 - first_stage, int(match[2]))
        elif int(match[1]) < len(blocks):
            block = blocks[int(match[1])]
        else:
            return module
        inner = match[match.lastindex or 1]
        expands = not spec.expanding or module.removesuffix(inner) + spec.expanding in modules
        part = (spec.parts if expands else spec.unexpanded_parts).get(inner)
        return f"{block}_{part}" if part else module

    return name_of


def _channels_last(layer: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 0, 1) if layer.endswith("dwconv") else tensor.transpose(2, 3, 1, 0)
    return tensor.T
