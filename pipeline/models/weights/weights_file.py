"""The form that every weight file is read into, whatever its format."""

from dataclasses import dataclass

import numpy as np

from pipeline.models.efficientnet import block_name
from pipeline.models.variants import VARIANTS, Normalization, Variant, stage_repeats

Arrays = dict[str, list[np.ndarray]]  # by layer name, in the order of the layer's weights; channels last


@dataclass(frozen=True)
class WeightsFile:
    """What a weight file holds, and what it says about the network that it is from.

    Attributes:
        layers: The arrays of every layer that has weights, by the names of `pipeline.models.efficientnet`. Names that
            are not understood are kept as they stand in the file.
        naming: Key of `pipeline.models.weights.makes.NAMINGS`: who names layers so.
        hints: Names of the architecture inside the file, the surest first.
        class_names: The classes in the order of the classifier's outputs; empty if the file has no list.
        is_ema: Whether the weights are a moving average, taken in preference to the last ones beside it.
        padding: Padding of the strided convolutions, as `Variant.padding`; None if the file does not say.
        batch_norm_epsilon: None if the file does not say.
        normalization: What the network does to pixels in [0, 255]; None if the file does not say.
        notes: What a user should know, a sentence each.
    """

    layers: Arrays
    naming: str
    hints: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    is_ema: bool = False
    padding: str | None = None
    batch_norm_epsilon: float | None = None
    normalization: Normalization | None = None
    notes: tuple[str, ...] = ()


def numbered_blocks(count: int, variant: Variant) -> list[str]:
    """Return the names of the blocks of a file that numbers them through, and so does not tell the stages.

    Args:
        count: Number of blocks.
        variant: What the weights are meant for; its stages are taken where it has so many blocks, else those of the
            first published variant that has.

    Returns:
        As many names; none if no variant has so many blocks.
    """
    repeats = next((r for v in (variant, *VARIANTS.values()) if sum(r := stage_repeats(v)) == count), [])
    return [block_name(stage, repeat) for stage, number in enumerate(repeats, 1) for repeat in range(number)]
