"""The section `model`: the network and its initial weights."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pipeline.config.base import Fraction, LocalPath, StrictModel
from pipeline.models.variants import LARGEST_PHI, SMALLEST_PHI, VARIANTS


class PhiConfig(StrictModel):
    """A variant by its compound coefficient."""

    phi: Annotated[float, Field(ge=SMALLEST_PHI, le=LARGEST_PHI)]
    """Compound coefficient; 0 is B0, and the resolution is 224 * 1.15^phi."""


class MultipliersConfig(StrictModel):
    """A variant by its multipliers relative to B0."""

    width: Annotated[float, Field(gt=0, le=10)]
    """Multiplier of the channels."""
    depth: Annotated[float, Field(gt=0, le=6)]
    """Multiplier of the repeats of a stage."""
    resolution: Annotated[int, Field(ge=32, le=4096)]
    """Side of the square input, in pixels."""


def _variant_form(value: Any) -> str:
    if isinstance(value, PhiConfig) or (isinstance(value, Mapping) and "phi" in value):
        return "phi"
    return "multipliers" if isinstance(value, Mapping | MultipliersConfig) else "name"


class ModelConfig(StrictModel):
    """The network and its initial weights."""

    variant: Annotated[
        Annotated[Literal[tuple(VARIANTS)], Tag("name")]  # type: ignore[valid-type]
        | Annotated[PhiConfig, Tag("phi")]
        | Annotated[MultipliersConfig, Tag("multipliers")],
        Discriminator(_variant_form),
    ] = "b0"
    """b0 to b8, l2, lite0 to lite4, {phi: 1.5} or {width: 1.1, depth: 1.2, resolution: 260}."""
    resolution: Annotated[int, Field(ge=32, le=4096)] | None = None
    """Side of the square input in pixels; null: that of the variant."""
    channels: Literal[3] = 3
    """Channels of the images and of the network's input; 3 is RGB."""
    weights: Annotated[str, AfterValidator(os.path.expanduser)] | None = "imagenet"
    """null: random; imagenet; imagenet:b2: the layers of another variant that fit; a file (.h5, .keras, .pth); or the
    directory of a run."""
    class_map: LocalPath | None = None
    """YAML of `new class: old class` or `new class: [old classes to merge]` for the classifier of the weights; null
    matches classes by name, and keeps rows if all match."""
    dropout: Fraction | None = None
    """Rate before the classifier; null: that of the variant."""
    drop_path_rate: Fraction = 0.2
    """Stochastic depth (arXiv 1603.09382): probability that the last block is dropped; it rises linearly from 0 at the
    first block."""
    batch_norm_momentum: Fraction = 0.99
    """Momentum of the moving statistics. The paper uses 0.99; runs of a few hundred steps from random weights need
    about 0.9."""

    @model_validator(mode="after")
    def _class_map_needs_weights(self) -> "ModelConfig":
        if self.class_map is not None and self.weights is None:
            raise ValueError(
                "class_map says where the rows of the weights' classifier go; set weights, or leave class_map out"
            )
        return self
