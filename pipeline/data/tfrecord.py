"""TFRecord files of tf.train.Example as an input of packing.

TFRecord files can only be read sequentially.
"""

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.console import plural
from pipeline.data.inspection import short_message
from pipeline.data.pack_inputs import PackRecord
from pipeline.data.sources.base import format_list, split_of
from pipeline.errors import DataError


class FeatureNames(NamedTuple):
    """The names of an Example's features."""

    image: str
    """The encoded file."""
    label: str
    """A number."""
    class_name: str | None
    """Text; None where there is none."""


LAYOUTS = (
    FeatureNames("image/encoded", "image/class/label", "image/class/text"),  # the TPU's ImageNet
    FeatureNames("image", "label", None),  # tensorflow-datasets
)
FILE_NAME = "image/filename"  # goes into the key where there is one


@dataclass(frozen=True)
class RecordFile:
    """A TFRecord file."""

    path: Path
    split: str | None

    @property
    def name(self) -> str:
        """The prefix of the keys of the file's images."""
        return f"{self.split}/{self.path.name}" if self.split else self.path.name


class TFRecordInput:
    """Uncompressed TFRecord files of tf.train.Example, as an input of packing.

    An image's key: `<split>/<file>/<number of the record>/<its own name, if any>`.
    """

    total = None

    def __init__(
        self,
        patterns: Sequence[str],
        features: Mapping[str, str],
        class_names: Sequence[str] | None,
        first_label: int | None,
    ) -> None:
        """Find the files and inspect the first record.

        Args:
            patterns: `train=FOLDER/train-*` or without the split, all with or all without.
            features: Names of the features that differ from LAYOUTS.
            class_names: In the order of the labels; None takes them from the records.
            first_label: The label of the first class: 0, or 1 where 0 is left to a background class; None takes 0, and
                refuses data for which that may be wrong.

        Raises:
            DataError: There is no such file, or its records have an unknown layout.
        """
        self._files = _record_files(patterns)
        self._names, self._first = class_names, first_label
        file, record = next(((file, record) for file in self._files for record in self._records(file, 0)), (None, b""))
        if file is None:
            raise DataError(f"--tfrecord: {plural(len(self._files), 'file')} without a record")
        example = _parse(record)
        layout = next((layout for layout in LAYOUTS if {layout.image, layout.label} <= set(example)), LAYOUTS[0])
        self._features = layout._replace(**features)
        self._to_record(file, 0, example)
        if class_names is None and self._features.class_name not in example:
            raise DataError(
                f"{file.path}: record 0 has no {self._features.class_name or 'text'} to call its class by (it has "
                f"{', '.join(sorted(example))});\n"
                "give --classes FILE with a name a line, such as the label.labels.txt of tensorflow-datasets, or "
                "--class-feature NAME"
            )
        self.identity = {
            file.name: f"{(s := file.path.stat()).st_size} bytes, changed at {s.st_mtime_ns} ns" for file in self._files
        }
        self.identity["features"] = " ".join(filter(None, self._features))
        self.settings = {
            "first label": first_label or 0,
            "digest of class names": hashlib.sha256("\n".join(class_names).encode()).hexdigest()
            if class_names
            else None,
        }

    def records(self, start: int, last: str | None) -> Iterator[PackRecord]:
        """Yield the records in the order of the pack."""
        del start
        file_index, number = 0, 0
        if last is not None:
            file_index = next(i for i, file in enumerate(self._files) if last.startswith(file.name + "/"))
            number = int(last.removeprefix(self._files[file_index].name + "/").partition("/")[0]) + 1
        for file in self._files[file_index:]:
            for record in self._records(file, number):
                yield self._to_record(file, number, _parse(record))
                number += 1
            number = 0

    def changes(self, rows: pa.Table) -> list[str]:
        """Return no changes: the files' sizes and modification times are part of the identity."""
        del rows
        return []

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the class names in the order of the labels."""
        labels = rows["label"].to_numpy()
        if self._first is None and labels.min() > 0:
            raise DataError(
                f"The smallest label is {labels.min()}. If the labels count from 1, add --first-label 1; if they count "
                "from 0 and the classes before it have no images, add --first-label 0. What has been written remains."
            )
        labels = labels - (self._first or 0)
        names = tuple(self._names or _class_names_in(rows, labels, self._first or 0))
        # Images may have been packed before the command line was changed.
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(
                f"There are labels from {rows['label'].to_numpy().min()} to {rows['label'].to_numpy().max()}, which "
                f"--first-label or the number of names in --classes ({len(names)}) does not fit. "
                "What has been written remains."
            )
        return names, labels.astype(np.int32)

    def _records(self, file: RecordFile, skip: int) -> Iterator[bytes]:
        try:
            yield from tf.data.TFRecordDataset(str(file.path)).skip(skip).as_numpy_iterator()
        except tf.errors.OpError as error:
            raise DataError(
                f"{file.path} is damaged, or no uncompressed TFRecord file: {short_message(error)}"
            ) from None

    def _to_record(self, file: RecordFile, number: int, example: Mapping[str, Any]) -> PackRecord:
        where, features = f"{file.path}: record {number}", self._features
        image, labels = example.get(features.image), example.get(features.label)
        if not image or not isinstance(image[0], bytes) or not labels or not isinstance(labels[0], int):
            raise DataError(
                f"{where} has no bytes {features.image} or no number {features.label}; it has "
                f"{', '.join(sorted(example)) or 'nothing'}: give their names with --image-feature and --label-feature"
            )
        if len(image) + len(labels) > 2:
            raise DataError(
                f"{where} has {plural(len(image), 'image')} and {plural(len(labels), 'label')}; needed is one of each"
            )
        first, classes = self._first or 0, len(self._names) if self._names else np.iinfo(np.int32).max
        if not first <= labels[0] < first + classes:
            hint = (
                "; do they count from 1? Then say --first-label 1"
                if labels[0] == classes and self._first is None
                else ""
            )
            raise DataError(f"{where} has the label {labels[0]}; valid are {first} to {first + classes - 1}{hint}")
        class_name, own = (_text(example.get(name), where) for name in (features.class_name or "", FILE_NAME))
        return PackRecord(
            f"{file.name}/{number}" + (f"/{own}" if own else ""), labels[0], class_name, file.split, 0, image[0]
        )


def _record_files(patterns: Sequence[str]) -> list[RecordFile]:
    files: list[RecordFile] = []
    for word in patterns:
        name, given, pattern = word.partition("=")
        if given and split_of(name) is None:
            raise DataError(f"--tfrecord {word}: the split is {name!r}; valid are train, val and test")
        matches = sorted(glob.glob(pattern if given else word))  # noqa: PTH207 - Path.glob takes no absolute pattern
        paths = [path for path in map(Path, matches) if path.is_file()]
        if not paths:
            raise DataError(f"--tfrecord {word}: there is no such file")
        files += [RecordFile(path, split_of(name) if given else None) for path in paths]
    if len({file.split is None for file in files}) > 1:
        raise DataError("--tfrecord: give the split of all files, as in train=FOLDER/train-*, or of none")
    names = [file.name for file in files]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(
            f"--tfrecord: {plural(len(doubled), 'file is', 'files are')} given twice, or share a name:\n"
            f"{format_list(doubled)}\nRename them."
        )
    return files


def _parse(record: bytes) -> dict[str, list[Any]]:
    """Return the features of an Example by name; none if the record is not an Example."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception:  # protobuf's own, of a package that is not among the dependencies
        return {}
    kinds = ((name, feature, feature.WhichOneof("kind")) for name, feature in features.items())
    return {name: list(getattr(feature, kind).value) for name, feature, kind in kinds if kind}


def _text(values: list[Any] | None, where: str) -> str | None:
    if not values or not isinstance(values[0], bytes):
        return None
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise DataError(f"{where} has text that is not UTF-8: {values[0][:40]!r}") from None


def _class_names_in(rows: pa.Table, labels: np.ndarray, first: int) -> list[str]:
    """Return the name of each label, as its images state it."""
    names: dict[int, str | None] = {}
    problems: dict[str, None] = {}
    for label, name in zip(labels.tolist(), rows["class_name"].to_pylist(), strict=True):
        known = names.setdefault(label, name)
        if not name:
            problems[f"label {label + first}: an image of it gives no name"] = None
        elif known != name:
            problems[f"label {label + first} is called {known!r} and {name!r}"] = None
    for label in islice((label for label in range(max(names)) if label not in names), 21):
        problems[f"label {label + first}: has no image that would name it"] = None
    taken: dict[str | None, int] = {}
    for label, name in sorted(names.items()):
        if taken.setdefault(name, label) != label:
            problems[f"labels {taken[name] + first} and {label + first} are both called {name!r}"] = None
    if problems:
        raise DataError(
            f"The names of the classes are not clear:\n{format_list(list(problems))}\n"
            "Give --classes FILE with a name a line, in the order of the labels: what has been written remains. "
            "Or start anew in another --out with another --class-feature."
        )
    return [str(names[label]) for label in sorted(names)]
