"""Image sources: an image folder, a CSV file, a pack, tensorflow-datasets, Hugging Face, or scikit-learn's digits.

Every source yields encoded image files, so that one decoder serves all of them.

| source      | key of an image                                      | splits given by the data          |
|-------------|------------------------------------------------------|-----------------------------------|
| folder      | path relative to the folder                          | {train,val,test}/<class>/<image>  |
| csv         | path relative to the CSV file's folder               | column `split`                    |
| pack        | that of the data set that was packed                 | those of the data set             |
| tfds        | <split>/<position>                                   | train, validation, test           |
| huggingface | <split>/<position>, or <split>/<position>/<its name> | train, validation, test           |
| digits      | 0 to 1796                                            | none                              |
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf

from pipeline.errors import DataError

SPLITS = ("train", "val", "test")
INTEGER = r"[+-]?(0|[1-9]\d*)(\.0*)?"  # 1 and 1.0, but not 01
MAX_LISTED = 20  # problems in a message
_SPLIT_NAMES = {  # accepted names, in any case
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> str | None:
    """Return the split that a folder or a value is named after: train, val or test; None if it names none."""
    return _SPLIT_NAMES.get(name.casefold())


class LabeledImage(NamedTuple):
    """A labeled image of a source, by its key."""

    key: str
    label: int
    """Position in the source's class names."""
    split: str | None
    """train, val or test where the data say so, else None. Either all images of a source have a split or none has."""


class FileStat(NamedTuple):
    """Size and version of an image file: while both stay the same, the contents are unchanged."""

    size: int
    """Bytes."""
    version: int
    """int64: a digest of a file's inode and of its times of modification and change, the latter of which no program can
    set back; or 64 bits of the SHA-256 of a packed image."""


class DataSource(Protocol):
    """The interface of a data set that the manifest and the input pipeline use."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def list_images(self) -> list[LabeledImage]:
        """Return all images, always in the same order."""

    def stat(self, key: str) -> FileStat | None:
        """Return what tells whether an image's file has changed; None if that requires reading it."""

    def read(self, key: str) -> bytes:
        """Return the encoded image file of a key."""

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Read an encoded image file in a tf.data graph: scalar string key to scalar string bytes."""


class DatasetNotDownloadedError(DataError):
    """An error for data that are not on this machine yet.

    Attributes:
        class_names: Class names of the data set, known without the data.
    """

    def __init__(self, message: str, class_names: tuple[str, ...]) -> None:
        """Create the error."""
        super().__init__(message)
        self.class_names = class_names


class LayoutProblem(NamedTuple):
    """A kind of mistake in the layout of a data set, with all places that have it."""

    text: str
    """A clause with the number of them."""
    items: tuple[str, ...]
    """All of them: a file, a class or a line each."""
    remedy: str
    """A sentence."""


class LayoutError(DataError):
    """An error for a layout with mistakes that leaves images to check.

    Attributes:
        problems: The mistakes; the message lists them.
        source: Source of the images that the mistakes do not affect.
    """

    def __init__(self, problems: Sequence[LayoutProblem], source: DataSource) -> None:
        """Create the error."""
        super().__init__("\n".join(f"{text}:\n{format_list(items)}\n{remedy}" for text, items, remedy in problems))
        self.problems, self.source = tuple(problems), source


class CorruptImageError(DataError):
    """An error for a packed image that differs from what was packed.

    Attributes:
        problem: A clause that continues the image's key.
    """

    def __init__(self, key: str, problem: str) -> None:
        """Create the error."""
        super().__init__(f"{key} {problem}")
        self.problem = problem


def index_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names, and the position of each label's class among them.

    If all labels are integers, 1 and 1.0 are the same class, and the classes are in the order of the numbers; else they
    are in alphabetical order.
    """
    if all(re.fullmatch(INTEGER, label) for label in set(labels)):
        numbers = [int(label.partition(".")[0]) for label in labels]  # a float would join large ones
        values = sorted(set(numbers))
        positions = {value: position for position, value in enumerate(values)}
        return tuple(map(str, values)), [positions[number] for number in numbers]
    names = sorted(set(labels))
    index = {name: position for position, name in enumerate(names)}
    return tuple(names), [index[label] for label in labels]


def call_in_graph(function: Callable[[bytes], bytes], argument: tf.Tensor) -> tf.Tensor:
    """Call a Python function in a tf.data graph.

    Args:
        function: Its DataError becomes an error of the graph with the same message; raised in the graph, an exception
            would put its traceback into the message.
        argument: Scalar string.

    Returns:
        Scalar string: what the function returns.
    """

    def result_or_message(content: bytes) -> tuple[bytes, bytes]:
        try:
            return function(content), b""
        except DataError as error:
            return b"", str(error).encode()

    result, message = tf.numpy_function(result_or_message, [argument], (tf.string, tf.string), stateful=False)
    succeeded = tf.raw_ops.Assert(condition=tf.equal(message, ""), data=[message])  # tf.debugging's takes 60 us
    with tf.control_dependencies([succeeded]):
        return tf.ensure_shape(tf.identity(result), ())


def read_in_python(read: Callable[[str], bytes], key: tf.Tensor) -> tf.Tensor:
    """Call a source's `read` in a tf.data graph.

    Args:
        read: Returns the encoded file of a key, or raises a CorruptImageError or an OSError.
        key: Scalar string.

    Returns:
        Scalar string: the file.
    """

    def read_key(key: bytes) -> bytes:
        try:
            return read(key.decode())
        except OSError as error:
            raise DataError(f"{key.decode()} cannot be opened: {error.strerror or error}") from None

    return call_in_graph(read_key, key)


def format_list(problems: Sequence[str]) -> str:
    """Format the first problems, one on a line, and the number of the others."""
    rest = [f"  and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n".join([*(f"  {problem}" for problem in problems[:MAX_LISTED]), *rest])
