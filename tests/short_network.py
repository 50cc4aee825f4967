"""A network of two blocks, for tests whose claim does not depend on the architecture: it is built and compiled fast."""

from dataclasses import replace
from typing import Any
from unittest import mock

import keras

from pipeline.models.efficientnet import efficientnet
from pipeline.models.variants import FAMILIES, BlockArgs, Variant

BLOCKS = (BlockArgs("mbconv", 5, 2, 6, 64, 2),)


def short_network(resolution: int = 32, **arguments: Any) -> keras.Model:
    """Build a network with every operation that EfficientNet has.

    The first block has a stride, the second one a residual connection; both have squeeze-and-excitation.

    Args:
        resolution: Side of the input, in pixels.
        arguments: Of `efficientnet`.
    """
    with mock.patch.dict(FAMILIES, {"short": replace(FAMILIES["efficientnet"], blocks=BLOCKS)}):
        return efficientnet(Variant("short", 1.0, 1.0, resolution, 0.2, "short"), **arguments)
