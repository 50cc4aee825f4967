"""The part of the schema that says which pictures a run sees and what training does to them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.augmentations import check_albumentations, check_native


class Section(BaseModel):
    """A mapping in the YAML whose keys are known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SplitsConfig(Section):
    """Shares of the splits that the program makes itself."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.7
    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitsConfig":
        total = self.train + self.val + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"train, val and test must add up to 1; they add up to {total:g}")
        return self


class DataConfig(Section):
    """Where the pictures come from and how they are cut to the input's square."""

    source: Literal["folder", "csv", "pack", "tfds", "digits"]
    """folder: <class>/<image> or {train,val,test}/<class>/<image>; csv: path, label and optionally split; pack: what `python -m pipeline
    pack` wrote; tfds; digits."""
    path: Path | None = None
    """The image folder, the CSV file, the pack's folder, or where tensorflow-datasets keeps its data (null: data/tfds)."""
    name: str | None = None
    """Name of the data set in tensorflow-datasets."""
    splits: SplitsConfig = SplitsConfig()
    """Used for the splits that the data do not bring along."""
    group_near_duplicates: bool = True
    """Keep near-duplicate pictures in one split. Turning it off makes the test figures optimistic."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do about files that cannot be used: fail lists them all and stops; skip leaves them out and lists them in a report."""
    on_leak: Literal["error", "warn", "ignore"] = "error"
    """What to do about near-duplicates in more than one of the splits that the data bring along."""
    resize: Literal["crop", "squash", "letterbox"] = "crop"
    """How a picture becomes a square in evaluation: crop takes the centre, squash distorts, letterbox pads."""

    @field_validator("path", mode="after")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> "DataConfig":
        needed = {"folder": "image folder", "csv": "CSV file", "pack": "folder that python -m pipeline pack wrote"}.get(self.source)
        if needed is not None and self.path is None:
            raise ValueError(f"source {self.source} needs path: the {needed}")
        if self.source == "tfds" and not self.name:
            raise ValueError("source tfds needs name: a data set of tensorflow-datasets, such as tf_flowers")
        if self.source != "tfds" and self.name:
            raise ValueError(f"name belongs to source tfds; with source {self.source} leave it out or set it to null")
        if self.source == "digits" and self.path is not None:
            raise ValueError("source digits ships with scikit-learn and takes no path; leave it out or set it to null")
        return self


class RandAugmentConfig(Section):
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719)."""

    num_ops: Annotated[int, Field(ge=1, le=8)] = 2
    """Operations that one image goes through, one after the other."""
    magnitude: Annotated[float, Field(ge=0, le=30)] = 9
    """Strength on the official scale of 0 to 30; the paper takes 17 for B5 and 28 for B7."""


class Transform(Section):
    """One augmentation by name, with its arguments."""

    name: str
    args: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """Takes `HorizontalFlip` and `{HorizontalFlip: {p: 0.5}}` as they stand in the YAML."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and set(value) != {"name", "args"}:
            if len(value) != 1:
                raise ValueError("each transform is one name with its arguments, as in - HorizontalFlip: {p: 0.5}")
            [(name, args)] = value.items()
            return {"name": name, "args": {} if args is None else args}
        return value


class AugmentConfig(Section):
    """What training does to the pictures. Evaluation does none of it."""

    backend: Literal["albumentations", "native"] = "native"
    """native runs inside TensorFlow and is fast; albumentations knows many more transforms."""
    transforms: tuple[Transform, ...] = ()
    """By albumentations' names and arguments; native knows RandomResizedCrop and HorizontalFlip. Sizes are fractions of the resolution."""
    randaugment: RandAugmentConfig | None = None
    """null for none."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of the Beta distribution of the mixing weight (arXiv 1710.09412); 0 for none."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of the Beta distribution of the pasted area (arXiv 1905.04899); 0 for none. With mixup too, each group of images draws one."""

    @field_validator("transforms", mode="after")
    @classmethod
    def _known(cls, transforms: tuple[Transform, ...], info: Any) -> tuple[Transform, ...]:
        backend = info.data.get("backend")
        for transform in transforms:
            if backend == "native":
                check_native(transform.name, transform.args)
            elif backend == "albumentations":
                check_albumentations(transform.name, transform.args)
        return transforms
