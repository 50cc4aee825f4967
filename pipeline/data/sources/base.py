"""Where samples come from: an image folder, a CSV file, a pack, tensorflow-datasets, or scikit-learn's digits.

Every source yields encoded image files, so that one decoder serves all of them.

| source | key of a sample                                   | splits given by the data          |
|--------|---------------------------------------------------|-----------------------------------|
| folder | path relative to the folder                       | {train,val,test}/<class>/<image>  |
| csv    | path relative to the CSV file's folder            | column `split`                    |
| pack   | that of the data set that was packed              | those of the data set             |
| tfds   | <split>/<position>                                | train, validation, test           |
| digits | 0 to 1796                                         | none                              |
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf

from pipeline.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}  # as people write them


class Sample(NamedTuple):
    """One labelled picture, as the data name it."""

    key: str
    label: int
    """Position in the source's class names."""
    split: str | None
    """train, val or test where the data say so, else None. Either all samples of a source have one or none has."""


class FileStat(NamedTuple):
    """What a picture's file is known by without being read: where it has not changed, neither have the contents."""

    size: int
    """Bytes."""
    version: int
    """int64: of a file of its own the time of change in nanoseconds, of a packed one 64 bits of its SHA-256."""


class DataSource(Protocol):
    """What the manifest and the stream need to know of a data set."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    def samples(self) -> list[Sample]:
        """All samples, always in the same order."""

    def stat(self, key: str) -> FileStat | None:
        """What tells whether a sample's file has changed; None where nothing does, short of reading it."""

    def read(self, key: str) -> bytes:
        """The encoded image file of a sample."""

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """The same in a tf.data graph: scalar string key to scalar string bytes."""


class DatasetNotDownloadedError(DataError):
    """The data are not on this machine yet.

    Attributes:
        class_names: Known all the same.
    """

    def __init__(self, message: str, class_names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.class_names = class_names


class CorruptImageError(DataError):
    """A packed picture is no longer what was packed.

    Attributes:
        problem: To be read behind the picture's key.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.problem = problem


def format_list(problems: Sequence[str], limit: int = 20) -> str:
    """The first problems, one on a line, and how many more there are."""
    rest = [f"  and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*(f"  {problem}" for problem in problems[:limit]), *rest])
