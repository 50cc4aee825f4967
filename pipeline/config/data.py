"""The section `data`: the source of the images, their splits, and the square crop in evaluation."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import LocalPath, StrictModel


class SplitsConfig(StrictModel):
    """Fractions of the splits that the program creates."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Fraction of the images to train on."""
    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the images that select epochs and fit the temperature."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the images for the final evaluation; the three fractions add up to 1."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitsConfig":
        total = self.train + self.val + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"train, val and test must add up to 1; they add up to {total:g}")
        return self


class CsvColumnsConfig(StrictModel):
    """Names of the columns of a CSV file."""

    path: str = "path"
    """Column with the paths of the images."""
    label: str = "label"
    """Column with the class names."""
    split: str = "split"
    """Column with the splits; it may be missing."""


class DataConfig(StrictModel):
    """The source of the images, their splits, and the square crop in evaluation."""

    source: Literal["folder", "csv", "pack", "tfds", "digits"]
    """folder: <class>/<image> or {train,val,test}/<class>/<image>; csv: columns path, label and optionally split; pack:
    the output of `python -m pipeline pack`; tfds: a data set of tensorflow-datasets; digits: the handwritten digits of
    scikit-learn."""
    path: LocalPath | None = None
    """The image folder, the CSV file, the folder of the pack, or the data folder of tensorflow-datasets (null:
    data/tfds)."""
    columns: CsvColumnsConfig = CsvColumnsConfig()
    """Names of the columns of the CSV file; other columns are ignored."""
    root: LocalPath | None = None
    """Folder that the relative paths of the CSV file start from; null: the folder of the file."""
    name: str | None = None
    """Name of the data set in tensorflow-datasets."""
    splits: SplitsConfig = SplitsConfig()
    """Fractions of the splits that the data set does not define."""
    group_near_duplicates: bool = True
    """Keep near-duplicate images in one split. false makes the test metrics optimistic."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: list all unusable files and stop; skip: leave them out and list them in a report."""
    on_leak: Literal["error", "warn", "ignore"] = "error"
    """Reaction to near-duplicates in more than one of the splits that the data set defines."""
    resize: Literal["crop", "squash", "letterbox"] = "crop"
    """Conversion to a square in evaluation: crop takes the center, squash distorts, letterbox pads."""

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
        if self.source != "csv" and (self.root is not None or self.columns != CsvColumnsConfig()):
            raise ValueError(f"columns and root belong to source csv; with source {self.source} leave them out")
        if self.source == "digits" and self.path is not None:
            raise ValueError("source digits ships with scikit-learn and takes no path; leave it out or set it to null")
        return self
