"""PyTorch's names and layouts of EfficientNet's tensors, turned into Keras's: efficientnet-pytorch and timm."""

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from pipeline.models.efficientnet import CLASSIFIER, block_name
from pipeline.models.variants import VARIANTS, Variant, stage_repeats

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


def to_keras_layers(tensors: Mapping[str, np.ndarray], variant: Variant) -> dict[str, list[np.ndarray]]:
    """Group the tensors of a state dict by Keras's layer names, with channels last.

    Args:
        tensors: Arrays by their PyTorch names.
        variant: What the weights are meant for. Files that number their blocks through do not tell the stages; where
            no published variant has their number of blocks, this variant's stages are taken.

    Returns:
        The arrays of each layer in the order of Keras's weights; unknown names are kept.
    """
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
