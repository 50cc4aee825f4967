"""Compound scaling as numbers: the published family, the rule behind it, and the rounding that makes a network of it.

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

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # depth, width and resolution per unit of phi; arXiv 1905.11946, section 3.3


@dataclass(frozen=True)
class Variant:
    """One member of the family.

    Attributes:
        name: As written in a config (`b0`, `lite3`), or how it was made (`phi=1.5`).
        width: Multiplier of the channels of every layer.
        depth: Multiplier of the repeats of every stage.
        resolution: Side of the square input, in pixels.
        dropout: Rate in front of the classifier.
        lite: No squeeze-and-excitation, ReLU6 for swish, stem, head, first and last stage unscaled.
    """

    name: str
    width: float
    depth: float
    resolution: int
    dropout: float
    lite: bool = False


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
        Variant("lite0", 1.0, 1.0, 224, 0.2, lite=True),
        Variant("lite1", 1.0, 1.1, 240, 0.2, lite=True),
        Variant("lite2", 1.1, 1.2, 260, 0.3, lite=True),
        Variant("lite3", 1.2, 1.4, 280, 0.3, lite=True),
        Variant("lite4", 1.4, 1.8, 300, 0.3, lite=True),
    )
}


def from_phi(phi: float) -> Variant:
    """Scales B0 by the compound coefficient: depth 1.2^phi, width 1.1^phi, resolution 224 * 1.15^phi.

    The published B1 to B7 are hand-picked near this line, not on it (phi = 7 gives depth 3.58 and 596 pixels; B7 has 3.1 and 600).
    The resolution is rounded to a whole pixel. Dropout is that of the published variant nearest in width.

    Args:
        phi: Compound coefficient; 0 is B0, negative values shrink it.

    Returns:
        The scaled variant, named `phi=<phi>`.
    """
    return from_multipliers(BETA**phi, ALPHA**phi, round(224 * GAMMA**phi), name=f"phi={phi:g}")


def phi_of(resolution: int) -> float:
    """The compound coefficient at which the formula gives a resolution, in pixels: the inverse of `from_phi`'s third factor."""
    return math.log(resolution / 224, GAMMA)


def from_multipliers(width: float, depth: float, resolution: int, *, name: str | None = None) -> Variant:
    """A variant off the table, with the dropout of the published B variant nearest in width."""
    nearest = min((v for v in VARIANTS.values() if not v.lite), key=lambda v: abs(v.width - width))
    return Variant(
        name or f"width={width:g},depth={depth:g},resolution={resolution}", width, depth, resolution, nearest.dropout
    )


def round_filters(filters: int, width: float, divisor: int = 8) -> int:
    """Scales a number of channels and rounds it to the nearest multiple of `divisor`, never below 90 % of the exact value."""
    exact = filters * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Scales a number of repeats, rounding up."""
    return math.ceil(repeats * depth)


IMAGENET_VARIANTS = (
    "b0",
    "b1",
    "b2",
    "b3",
    "b4",
    "b5",
    "b6",
    "b7",
    "lite0",
    "lite1",
    "lite2",
)  # with weights to be had by name
