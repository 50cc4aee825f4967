"""Families and variants: their tables, the rule of compound scaling, and its rounding.

Pure Python: importing this module loads nothing else, so that a wrong variant in a config is answered at once.

| variant       | source of width, depth, resolution and dropout                                        |
|---------------|---------------------------------------------------------------------------------------|
| b0 - b7       | Tan & Le 2019 (arXiv 1905.11946) and tensorflow/tpu models/official/efficientnet       |
| b8            | Xie et al. 2020, AdvProp (arXiv 1911.09665)                                            |
| l2            | Xie et al. 2020, Noisy Student (arXiv 1911.04252)                                      |
| lite0 - lite4 | tensorflow/tpu models/official/efficientnet/lite                                       |
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # depth, width and resolution per unit of phi; arXiv 1905.11946, section 3.3
SMALLEST_PHI, LARGEST_PHI = -6, 9  # of a config
FILTERS_DIVISOR = 8

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixel / 255, per channel
LITE_MEAN, LITE_STD = 127.0, 128.0  # of the pixel


class Normalization(NamedTuple):
    """What the first layer of a network does to pixels in [0, 255]: `pixel * scale + offset`.

    Each is a number, or one for each channel.
    """

    scale: float | tuple[float, ...]
    offset: float | tuple[float, ...]


NORMALIZATIONS = {  # by the name in a config
    "imagenet": Normalization(  # (pixel / 255 - mean) / std
        tuple(1 / (255 * std) for std in IMAGENET_STD),
        tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)),
    ),
    "lite": Normalization(1 / LITE_STD, -LITE_MEAN / LITE_STD),
    "inception": Normalization(1 / 127.5, -1.0),
    "unit": Normalization(1 / 255, 0.0),
    "none": Normalization(1.0, 0.0),
}


class BlockArgs(NamedTuple):
    """A row of a family's table: blocks that differ only in that the first has the stride and changes the channels."""

    block: str
    """Type of the blocks, a key of `pipeline.models.efficientnet.BLOCKS`."""
    kernel: int
    stride: int
    expand: int
    filters: int
    repeats: int


@dataclass(frozen=True)
class Family:
    """What the variants of a family share.

    Attributes:
        blocks: The table of the unscaled network, a row for each stage.
        stem_filters: Channels of the first convolution.
        top_filters: Channels of the last convolution.
        activation: Keras's name of the activation.
        se_ratio: Squeezed channels as a share of the channels that enter the block (before its expansion); None for no
            squeeze-and-excitation.
        scale_ends: Whether width scales stem and top, and depth the first and the last stage.
        normalization: How its published weights expect their input; a key of `NORMALIZATIONS`.
        batch_norm_epsilon: Of every batch normalization.
    """

    blocks: tuple[BlockArgs, ...]
    stem_filters: int
    top_filters: int
    activation: str
    se_ratio: float | None
    scale_ends: bool
    normalization: str
    batch_norm_epsilon: float = 1e-3


EFFICIENTNET_BLOCKS = (
    BlockArgs("mbconv", 3, 1, 1, 16, 1),
    BlockArgs("mbconv", 3, 2, 6, 24, 2),
    BlockArgs("mbconv", 5, 2, 6, 40, 2),
    BlockArgs("mbconv", 3, 2, 6, 80, 3),
    BlockArgs("mbconv", 5, 1, 6, 112, 3),
    BlockArgs("mbconv", 5, 2, 6, 192, 4),
    BlockArgs("mbconv", 3, 1, 6, 320, 1),
)

FAMILIES = {
    "efficientnet": Family(
        EFFICIENTNET_BLOCKS,
        stem_filters=32,
        top_filters=1280,
        activation="swish",
        se_ratio=0.25,
        scale_ends=True,
        normalization="imagenet",
    ),
    "efficientnet_lite": Family(
        EFFICIENTNET_BLOCKS,
        stem_filters=32,
        top_filters=1280,
        activation="relu6",
        se_ratio=None,
        scale_ends=False,
        normalization="lite",
    ),
}


@dataclass(frozen=True)
class Variant:
    """One member of a family.

    Attributes:
        name: As written in a config (`b0`, `lite3`), or how it was made (`phi=1.5`).
        width: Multiplier of the channels of every layer.
        depth: Multiplier of the repeats of every stage.
        resolution: Side of the square input, in pixels.
        dropout: Rate in front of the classifier.
        family_name: Key of `FAMILIES`.
        padding: Of the strided convolutions. `same` is TensorFlow's: as many zeros as the output needs, the odd one
            below and to the right. `symmetric` is PyTorch's: kernel // 2 zeros on every side.
        input_normalization: What the first layer does; None for that of the family.
    """

    name: str
    width: float
    depth: float
    resolution: int
    dropout: float
    family_name: str = "efficientnet"
    padding: str = "same"
    input_normalization: Normalization | None = None

    @property
    def family(self) -> Family:
        """Tables that the variant scales."""
        return FAMILIES[self.family_name]

    @property
    def normalization(self) -> Normalization:
        """What the first layer of the network does to pixels in [0, 255]."""
        return self.input_normalization or NORMALIZATIONS[self.family.normalization]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("b0", 1.0, 1.0, 224, 0.2),
        Variant("b1", 1.0, 1.1, 240, 0.2),
        Variant("b2", 1.1, 1.2, 260, 0.3),
        Variant("b3", 1.2, 1.4, 300, 0.3),
        Variant("b4", 1.4, 1.8, 380, 0.4),
        Variant("b5", 1.6, 2.2, 456, 0.4),
        Variant("b6", 1.8, 2.6, 528, 0.5),
        Variant("b7", 2.0, 3.1, 600, 0.5),
        Variant("b8", 2.2, 3.6, 672, 0.5),
        Variant("l2", 4.3, 5.3, 800, 0.5),
        Variant("lite0", 1.0, 1.0, 224, 0.2, "efficientnet_lite"),
        Variant("lite1", 1.0, 1.1, 240, 0.2, "efficientnet_lite"),
        Variant("lite2", 1.1, 1.2, 260, 0.3, "efficientnet_lite"),
        Variant("lite3", 1.2, 1.4, 280, 0.3, "efficientnet_lite"),
        Variant("lite4", 1.4, 1.8, 300, 0.3, "efficientnet_lite"),
    )
}


def from_phi(phi: float) -> Variant:
    """Scale B0 by the compound coefficient: depth 1.2^phi, width 1.1^phi, resolution 224 * 1.15^phi.

    The published B1 to B7 are hand-picked near this line, not on it (phi = 7 gives depth 3.58 and 596 pixels; B7 has
    3.1 and 600). The resolution is rounded to a whole pixel. Dropout is that of the published variant nearest in width.

    Args:
        phi: Compound coefficient; 0 is B0, negative values shrink it.

    Returns:
        The scaled variant, named `phi=<phi>`.
    """
    return from_multipliers(BETA**phi, ALPHA**phi, round(224 * GAMMA**phi), name=f"phi={phi:g}")


def phi_of(resolution: int) -> float:
    """Return the compound coefficient that gives a resolution in pixels: the inverse of `from_phi`'s third factor."""
    return math.log(resolution / 224, GAMMA)


def from_multipliers(width: float, depth: float, resolution: int, *, name: str | None = None) -> Variant:
    """Make a variant off the table, with the dropout of the published B variant nearest in width."""
    nearest = min(
        (variant for variant in VARIANTS.values() if variant.family_name == "efficientnet"),
        key=lambda variant: abs(variant.width - width),
    )
    return Variant(
        name or f"width={width:g},depth={depth:g},resolution={resolution}", width, depth, resolution, nearest.dropout
    )


def round_filters(filters: int, width: float) -> int:
    """Scale a number of channels and round it to a multiple of 8, never below 90 % of the exact value."""
    exact = filters * width
    rounded = max(FILTERS_DIVISOR, int(exact + FILTERS_DIVISOR / 2) // FILTERS_DIVISOR * FILTERS_DIVISOR)
    return rounded + FILTERS_DIVISOR if rounded < 0.9 * exact else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Scale a number of repeats, rounding up."""
    return math.ceil(repeats * depth)


def stage_repeats(variant: Variant) -> list[int]:
    """Return the number of blocks in each stage of a variant."""
    blocks = variant.family.blocks
    unscaled = () if variant.family.scale_ends else (0, len(blocks) - 1)
    return [
        stage.repeats if i in unscaled else round_repeats(stage.repeats, variant.depth)
        for i, stage in enumerate(blocks)
    ]


def stage_filters(variant: Variant) -> list[int]:
    """Return the channels that each stage of a variant puts out."""
    return [round_filters(stage.filters, variant.width) for stage in variant.family.blocks]


def end_filters(variant: Variant) -> tuple[int, int]:
    """Return the channels of a variant's first and last convolution."""
    family = variant.family
    width = variant.width if family.scale_ends else 1.0
    return round_filters(family.stem_filters, width), round_filters(family.top_filters, width)


# The variants whose ImageNet weights are available by name.
IMAGENET_VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "lite0", "lite1", "lite2")
