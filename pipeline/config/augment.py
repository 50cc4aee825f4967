"""The section `augment`: the augmentation of training images, with the transforms and arguments of each backend."""

import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import StrictModel
from pipeline.errors import suggest

NATIVE_TRANSFORMS = {"RandomResizedCrop": ("scale", "ratio"), "HorizontalFlip": ("p",)}


class RandAugmentConfig(StrictModel):
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719)."""

    num_ops: Annotated[int, Field(ge=1, le=8)] = 2
    """Operations that are applied to an image in turn."""
    magnitude: Annotated[float, Field(ge=0, le=30)] = 9
    """Strength on the official scale of 0 to 30; the paper uses 17 for B5 and 28 for B7."""


class TransformConfig(StrictModel):
    """A transform by name, with its arguments."""

    name: str
    """Name of the transform. The short form is `- HorizontalFlip: {p: 0.5}`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the transform."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """Accept `HorizontalFlip` and `{HorizontalFlip: {p: 0.5}}` as written in YAML."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and set(value) != {"name", "args"}:
            if len(value) != 1:
                raise ValueError("each transform is one name with its arguments, as in - HorizontalFlip: {p: 0.5}")
            [(name, args)] = value.items()
            return {"name": name, "args": {} if args is None else args}
        return value


class AugmentConfig(StrictModel):
    """Augmentation of training images. Evaluation does not augment."""

    backend: Literal["albumentations", "native"] = "native"
    """native: inside TensorFlow, fast; albumentations: many more transforms."""
    transforms: tuple[TransformConfig, ...] = ()
    """Transforms with the names and arguments of albumentations; native has RandomResizedCrop and HorizontalFlip. Sizes
    are fractions of the resolution."""
    randaugment: RandAugmentConfig | None = None
    """Settings of RandAugment; null turns it off."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of the Beta distribution of the mixing weight (arXiv 1710.09412); 0 turns MixUp off."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of the Beta distribution of the pasted area (arXiv 1905.04899); 0 turns CutMix off. With MixUp and CutMix,
    each group of images draws one of them."""

    @field_validator("transforms", mode="after")
    @classmethod
    def _check_transforms(cls, transforms: tuple[TransformConfig, ...], info: Any) -> tuple[TransformConfig, ...]:
        backend = info.data.get("backend")
        for transform in transforms:
            if backend == "native":
                check_native(transform.name, transform.args)
            elif backend == "albumentations":
                check_albumentations(transform.name, transform.args)
        return transforms


def check_native(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the native backend lacks the transform or does not accept the arguments."""
    if name not in NATIVE_TRANSFORMS:
        raise ValueError(
            f"the native backend knows {' and '.join(NATIVE_TRANSFORMS)}; for {name} set backend: albumentations"
        )
    for key, value in arguments.items():
        if key not in NATIVE_TRANSFORMS[name]:
            raise ValueError(f"{name} has no argument {key!r}{suggest(key, NATIVE_TRANSFORMS[name])}")
        if key == "p" and not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name}: p is a probability from 0 to 1; received {value!r}")
        if key in ("scale", "ratio"):
            top = 1 if key == "scale" else 100
            if not (
                isinstance(value, Sequence)
                and len(value) == 2
                and all(map(_is_number, value))
                and 0 < value[0] <= value[1] <= top
            ):
                raise ValueError(f"{name}: {key} is a pair [low, high] above 0 and at most {top}; received {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def import_albumentations() -> ModuleType:
    """Import albumentations without its request to the network for its newest version."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def check_albumentations(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if albumentations lacks the transform or an argument; values are checked when it is built."""
    albumentations = import_albumentations()
    exported = {each: value for each, value in vars(albumentations).items() if isinstance(value, type)}
    known = {each: value for each, value in exported.items() if issubclass(value, albumentations.BasicTransform)}
    if name not in known:
        raise ValueError(f"albumentations has no transform {name!r}{suggest(name, known)}")
    schema: Any = known[name].InitSchema  # type: ignore[attr-defined]
    unknown = [key for key in arguments if key not in schema.model_fields or key == "strict"]
    if unknown:
        raise ValueError(
            "; ".join(f"{name} has no argument {key!r}{suggest(key, schema.model_fields)}" for key in unknown)
        )
