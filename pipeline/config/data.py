"""The section `data`: the source of the images, their splits, and the square crop in evaluation."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import LocalPath, StrictModel, is_address
from pipeline.console import command_line

Background = Literal["white", "black"]


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


class ColumnsConfig(StrictModel):
    """Names of the columns of a CSV file or of a data set of Hugging Face."""

    path: str = "path"
    """CSV: column with the paths of the images."""
    image: str | None = None
    """Hugging Face: column with the images; null: the column of images, if there is only one."""
    label: str | None = None
    """Column with the labels; null: `label` in a CSV file; in a data set of Hugging Face the column of class labels, if
    there is only one, else `label`."""
    split: str = "split"
    """CSV: column with the splits; it may be missing."""


# By source: the keys that it needs, with what they name, and those that it may have. The other keys in these dicts are
# refused: they would be ignored.
SOURCE_KEYS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "folder": ({"path": "the image folder"}, ()),
    "csv": ({"path": "the CSV file"}, ("root", "columns")),
    "pack": ({"path": "the folder that python -m pipeline pack wrote"}, ()),
    "tfds": ({"name": "a data set of tensorflow-datasets, such as tf_flowers"}, ("path",)),
    "huggingface": ({}, ("name", "path", "config_name", "revision", "columns")),
    "digits": ({}, ()),
}


class DataConfig(StrictModel):
    """The source of the images, their splits, and the square crop in evaluation."""

    source: Literal["folder", "csv", "pack", "tfds", "huggingface", "digits"]
    """folder: <class>/<image> or {train,val,test}/<class>/<image>; csv: columns path, label and optionally split; pack:
    the output of `python -m pipeline pack`; tfds: a data set of tensorflow-datasets; huggingface: a data set of
    the library datasets, from the Hugging Face Hub or from a folder; digits: the handwritten digits of scikit-learn."""
    path: LocalPath | None = None
    """The image folder, the CSV file, the folder of the pack, the data folder of tensorflow-datasets (null: data/tfds),
    or a folder that the library datasets loads."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the columns of the CSV file or of the data set of Hugging Face; other columns are ignored."""
    root: LocalPath | None = None
    """Folder that the relative paths of the CSV file start from; null: the folder of the file."""
    name: str | None = None
    """Name of the data set in tensorflow-datasets, or its id on the Hugging Face Hub, such as ethz/food101."""
    config_name: str | None = None
    """Configuration (subset) of a data set of Hugging Face that has several."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hugging Face Hub; null: main."""
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
    background: Background = "white"
    """Color that transparent images are put on. White, because they are mostly made for white pages: see
    docs/data.md."""

    @field_validator("path", "root", mode="before")
    @classmethod
    def _answer_address(cls, value: Any, info: ValidationInfo) -> Any:
        """Answer an address with the command that brings its data to this machine."""
        if not isinstance(value, str) or not is_address(value):
            return value
        remedy = "download it first, or, if it is a CSV file, TFRecord files or tar shards, pack it: "
        words = ["--csv", "FILE"]
        if info.data.get("source") == "csv":
            remedy = "pack the images first: "
            is_root = info.field_name == "root"
            words = ["--csv", str(info.data.get("path")), "--root", value] if is_root else ["--csv", value]
        raise ValueError(
            f"must be a path on this machine; received the address {value}; {remedy}"
            f"{command_line('pack', *words, '--out', 'PACK')}, then data.source=pack data.path=PACK"
        )

    @model_validator(mode="after")
    def _check_source_keys(self) -> "DataConfig":
        needed, optional = SOURCE_KEYS[self.source]
        for key, description in needed.items():
            if getattr(self, key) in (None, ""):
                raise ValueError(f"source {self.source} needs {key}: {description}")
        for key in dict.fromkeys(key for parts in SOURCE_KEYS.values() for part in parts for key in part):
            if key not in needed and key not in optional and getattr(self, key) != type(self).model_fields[key].default:
                owners = [name for name, keys in SOURCE_KEYS.items() if any(key in part for part in keys)]
                remedy = "leave it out" if key == "columns" else "leave it out or set it to null"
                raise ValueError(f"{key} belongs to source {' or '.join(owners)}; with source {self.source} {remedy}")
        return self

    @model_validator(mode="after")
    def _check_huggingface_keys(self) -> "DataConfig":
        if self.source == "huggingface" and (not self.name) == (self.path is None):
            raise ValueError(
                "source huggingface needs either name, an id on the Hugging Face Hub such as ethz/food101, or path, a "
                f"folder; received {'both' if self.name else 'neither'}"
            )
        if self.source == "huggingface" and self.path is not None and self.revision is not None:
            raise ValueError("revision belongs to data sets on the Hugging Face Hub; with path leave it out")
        for key in ("path", "split") if self.source == "huggingface" else ("image",):
            if getattr(self.columns, key) != ColumnsConfig.model_fields[key].default:
                raise ValueError(f"columns.{key} does not belong to source {self.source}; leave it out")
        return self
