"""The section `export`: the largest differences between an exported file and the model."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Fraction, PositiveFloat, PositiveInt, StrictModel


class ExportConfig(StrictModel):
    """The limits that an exported file has to meet on all images of a split."""

    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Fraction of the images with the same top-1 class as the model."""
    max_accuracy_loss: Fraction = 0.01
    """Largest difference between the model's accuracy and that of the file."""
    max_logit_difference: PositiveFloat = 1e-3
    """Largest difference of a logit, in standard deviations of the model's logits. Not applied to int8, which rounds by
    design."""
    calibration_images: PositiveInt = 200
    """Training images that calibrate the activation ranges of int8."""
