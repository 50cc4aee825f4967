"""The section `model`: the network and its initial weights."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, FiniteFloat, Tag, model_validator

from pipeline.config.base import Fraction, LocalPath, PositiveFloat, StrictModel
from pipeline.models.variants import LARGEST_PHI, NORMALIZATIONS, SMALLEST_PHI, VARIANTS, Normalization
from pipeline.models.weights.makes import MAKES, mean_and_std, name_normalization


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


class NormalizationConfig(StrictModel):
    """Normalization of the input by numbers: (pixel - mean) / std, with pixels in [0, 255]."""

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    """Red, green, blue."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Red, green, blue."""


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
    """null: random; imagenet; imagenet:b2: the layers of another variant that fit; a file of Keras, PyTorch or
    safetensors; the directory of a run, or of a model from a hub."""
    weights_from: Literal[tuple(MAKES)] | None = None  # type: ignore[valid-type]
    """Who made the file: keras, timm, timm-native, torchvision, advprop ... decides padding, epsilon and normalization
    where files of several makes have the same names; null: as the file says."""
    weights_classes: LocalPath | None = None
    """Text file with a line for each class of the weights' classifier, in its order; null: as the file says, or a
    classes.txt or config.json beside it."""
    partial_weights: bool = False
    """Accept a file that does not fit all layers, and leave the others random. imagenet:b2 does so by itself."""
    class_map: LocalPath | None = None
    """YAML of `new class: old class` or `new class: [old classes to merge]` for the classifier of the weights; null
    matches classes by name, and keeps rows if all match."""
    padding: Literal["auto", "same", "symmetric"] = "auto"
    """Of the strided convolutions: same (TensorFlow) or symmetric (PyTorch); auto: that of the weights."""
    normalization: Literal["auto", *NORMALIZATIONS] | NormalizationConfig = "auto"  # type: ignore[valid-type]
    """Of the pixels in [0, 255], inside the network: imagenet (mean and std), lite ((x - 127) / 128), inception
    (x / 127.5 - 1), unit (x / 255), none, or {mean: [r, g, b], std: [r, g, b]}; auto: that of the weights."""
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

    @model_validator(mode="after")
    def _weights_keys_need_weights(self) -> "ModelConfig":
        if self.weights is None and (self.weights_from is not None or self.weights_classes is not None):
            raise ValueError("weights_from and weights_classes describe the weights; set weights, or leave them out")
        return self

    def with_network(self, padding: str, normalization: Normalization) -> "ModelConfig":
        """Return the section with padding and normalization in the place of auto.

        Args:
            padding: same or symmetric.
            normalization: What the first layer does to pixels in [0, 255].
        """
        updates: dict[str, Any] = {}
        if self.padding == "auto":
            updates["padding"] = padding
        if self.normalization == "auto":
            mean, std = mean_and_std(normalization)
            updates["normalization"] = name_normalization(normalization) or NormalizationConfig(
                mean=tuple(mean),
                std=tuple(std),
            )
        return self.model_copy(update=updates)

    @property
    def input_normalization(self) -> Normalization | None:
        """What the first layer does to pixels in [0, 255]; None while that is auto."""
        chosen = self.normalization
        if isinstance(chosen, NormalizationConfig):
            return Normalization(
                tuple(1 / std for std in chosen.std),
                tuple(-mean / std for mean, std in zip(chosen.mean, chosen.std, strict=True)),
            )
        return NORMALIZATIONS.get(chosen)
