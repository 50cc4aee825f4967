"""The section `data`: where the images come from, how they are split and how they become squares."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import StrictModel


class SplitsConfig(StrictModel):
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


class DataConfig(StrictModel):
    """Where the pictures come from and how they are cut to the input's square."""

    source: Literal["folder", "csv", "pack", "tfds", "digits"]
    """folder: <class>/<image> or {train,val,test}/<class>/<image>; csv: path, label and optionally split; pack: what
    `python -m pipeline pack` wrote; tfds; digits."""
    path: Path | None = None
    """The image folder, the CSV file, the pack's folder, or where tensorflow-datasets keeps its data (null.

    Data/tfds).
    """
    name: str | None = None
    """Name of the data set in tensorflow-datasets."""
    splits: SplitsConfig = SplitsConfig()
    """Used for the splits that the data do not bring along."""
    group_near_duplicates: bool = True
    """Keep near-duplicate pictures in one split. Turning it off makes the test figures optimistic."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do about files that cannot be used: fail lists them all and stops.

    Skip leaves them out and lists them in a report.
    """
    on_leak: Literal["error", "warn", "ignore"] = "error"
    """What to do about near-duplicates in more than one of the splits that the data bring along."""
    resize: Literal["crop", "squash", "letterbox"] = "crop"
    """How a picture becomes a square in evaluation: crop takes the centre, squash distorts, letterbox pads."""

    @field_validator("path", mode="after")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path is not None else None

    @model_validator(mode="after")
    def _check_source_keys(self) -> "DataConfig":
        needed = {"folder": "image folder", "csv": "CSV file", "pack": "folder that python -m pipeline pack wrote"}.get(
            self.source
        )
        if needed is not None and self.path is None:
            raise ValueError(f"source {self.source} needs path: the {needed}")
        if self.source == "tfds" and not self.name:
            raise ValueError("source tfds needs name: a data set of tensorflow-datasets, such as tf_flowers")
        if self.source != "tfds" and self.name:
            raise ValueError(f"name belongs to source tfds; with source {self.source} leave it out or set it to null")
        if self.source == "digits" and self.path is not None:
            raise ValueError("source digits ships with scikit-learn and takes no path; leave it out or set it to null")
        return self
