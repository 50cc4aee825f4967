"""The manifest: the table of all images that training sees."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources.base import SPLITS, format_list
from pipeline.errors import DataError
from pipeline.files import atomic_write

COLUMNS = {
    "key": "str",
    "label": "int32",
    "split": "str",
    "group": "int64",
    "sha256": "str",
    "height": "int32",
    "width": "int32",
    "orientation": "uint8",
}
OPTIONAL_COLUMNS = {"transcoded": "bool"}  # without the column, of no image
CHUNK_ROWS = 65_536  # rows that are converted to Python objects at a time


class SkippedImage(NamedTuple):
    """An image that cannot be used."""

    key: str
    problem: str
    """A clause that continues the key."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """All usable images of a data set.

    Attributes:
        class_names: In the order of the labels.
        table: One row per image; the row's number is the image's index. Columns: key (str), label (int32), split
            (train, val or test), group (int64, equal for near-duplicates), sha256 (of the encoded file, hexadecimal),
            height, width (int32, pixels as stored), orientation (uint8, EXIF 1 to 8: how to turn what is stored). Only
            if an image needs it: transcoded (bool), whether its file passes through `transcoding.transcode`; height,
            width and orientation are then of the result.
        notes: Warnings about the data, a sentence each.
        skipped_images: The images that have no row, because they cannot be used.
    """

    class_names: tuple[str, ...]
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    skipped_images: tuple[SkippedImage, ...] = ()

    def indices(self, split: str) -> np.ndarray:
        """Return the indices of a split's images, int64 (n,), ascending."""
        return np.flatnonzero(self.table["split"].to_numpy() == split).astype(np.int64)

    @property
    def transcoded(self) -> np.ndarray:
        """For each image, whether its file passes through `transcoding.transcode`, bool (N,)."""
        if "transcoded" in self.table:
            return self.table["transcoded"].to_numpy(bool)
        return np.zeros(len(self.table), bool)

    @property
    def evaluation_split(self) -> str:
        """The split that a run is evaluated on: test, or val where there is no test split."""
        return "test" if len(self.indices("test")) else "val"

    def class_counts(self) -> pd.DataFrame:
        """Return the number of images per class (rows, by name) and split (columns train, val, test), int64."""
        counts = pd.crosstab(self.table["label"], self.table["split"]).reindex(
            index=range(len(self.class_names)), columns=SPLITS, fill_value=0
        )
        return (
            counts.set_axis(list(self.class_names), axis="index")
            .rename_axis(index="class", columns="split")
            .astype("int64")
        )

    def digest(self) -> str:
        """Return the SHA-256 of class names, keys, labels, splits and contents, hexadecimal.

        It is equal if and only if training sees the same data.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name in ("key", "label", "split", "sha256"):
            for part in _json_list(self.table[name]):
                digest.update(part.encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a Parquet file atomically."""
        atomic_write(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the contents of the Parquet file."""
        rows = pa.Table.from_pandas(self.table, preserve_index=False)
        metadata = {name: json.dumps(getattr(self, name)) for name in ("class_names", "notes", "skipped_images")}
        content = io.BytesIO()
        pq.write_table(rows.replace_schema_metadata({**(rows.schema.metadata or {}), **metadata}), content)
        return content.getvalue()

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read a manifest that `save` wrote.

        Raises:
            DataError: The file is missing or is no manifest.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a readable manifest: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Return the manifest that `to_bytes` serialized."""
        # Of many chunks, each look at some rows would join them all.
        rows = pq.read_table(io.BytesIO(content)).combine_chunks()
        lists = {
            name: json.loads(rows.schema.metadata[name.encode()]) for name in ("class_names", "notes", "skipped_images")
        }
        skipped_images = tuple(SkippedImage(*row) for row in lists["skipped_images"])
        columns = COLUMNS | {name: kind for name, kind in OPTIONAL_COLUMNS.items() if name in rows.column_names}
        table = rows.to_pandas()[list(columns)].astype(columns)
        return cls(tuple(lists["class_names"]), table, tuple(lists["notes"]), skipped_images)

    def write_skipped_images(self, path: Path) -> None:
        """Write a CSV file of the images that are skipped: path, problem."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "problem"), *self.skipped_images])


def describe_changes(before: Manifest, after: Manifest) -> str:
    """Return the differences between two manifests, a line each; empty if training sees the same data."""
    if before.digest() == after.digest():
        return ""
    old, new = (
        each.table.assign(label=np.array(each.class_names, object)[each.table["label"]]).set_index("key")
        for each in (before, after)
    )
    both = old.index[old.index.isin(new.index)]
    lines: list[str] = []
    if before.class_names != after.class_names:
        lines.append(f"classes: were {', '.join(before.class_names)}; are {', '.join(after.class_names)}")
    for column, what in (
        ("sha256", "has other contents"),
        ("label", "has another label"),
        ("split", "is in another split"),
    ):
        lines += [
            f"{key}: {what}" for key in both[old.loc[both, column].to_numpy() != new.loc[both, column].to_numpy()]
        ]
    lines += [f"{key}: is new" for key in new.index[~new.index.isin(old.index)]]
    lines += [f"{key}: is gone" for key in old.index[~old.index.isin(new.index)]]
    return format_list(lines or ["the images come in another order"])


def _json_list(column: pd.Series) -> Iterator[str]:
    """Yield the column as json.dumps would write its list, in parts."""
    yield "["
    for start in range(0, len(column), CHUNK_ROWS):
        yield (", " if start else "") + json.dumps(column.iloc[start : start + CHUNK_ROWS].tolist())[1:-1]
    yield "]"
