"""The section `export`: how close an exported file must come to the model."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Fraction, PositiveFloat, PositiveInt, StrictModel


class ExportConfig(StrictModel):
    """What an exported file must come up to, over all images of a split, to be taken for the model."""

    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the images to which it must give the same top-1 class as the model."""
    max_accuracy_loss: Fraction = 0.01
    """How far its accuracy may lie below the model's."""
    max_logit_difference: PositiveFloat = 1e-3
    """The largest difference of a logit, in standard deviations of the model's logits.

    Not asked of int8, which rounds by intention.
    """
    calibration_images: PositiveInt = 200
    """Training images that int8 takes the ranges of its activations from."""
