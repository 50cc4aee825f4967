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

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import tensorflow as tf
from PIL import Image

from pipeline.data.picture_files import is_hidden, is_picture, pictures_below
from pipeline.data_config import DataConfig
from pipeline.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # as people write them


class Sample(NamedTuple):
    """One labelled picture, as the data name it."""

    key: str
    label: int
    """Position in the source's class names."""
    split: str | None
    """train, val or test where the data say so, else None. Either all samples of a source have one or none has."""


class Status(NamedTuple):
    """What a picture's file is known by without being read: where it has not changed, neither have the contents."""

    size: int
    """Bytes."""
    version: int
    """int64: of a file of its own the time of change in nanoseconds, of a packed one 64 bits of its SHA-256."""


class Source(Protocol):
    """What the manifest and the stream need to know of a data set."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    def samples(self) -> list[Sample]:
        """All samples, always in the same order."""

    def status(self, key: str) -> Status | None:
        """What tells whether a sample's file has changed; None where nothing does, short of reading it."""

    def read(self, key: str) -> bytes:
        """The encoded image file of a sample."""

    def encoded(self, key: tf.Tensor) -> tf.Tensor:
        """The same in a tf.data graph: scalar string key to scalar string bytes."""


class NotFetchedError(DataError):
    """The data are not on this machine yet.

    Attributes:
        class_names: Known all the same.
    """

    def __init__(self, message: str, class_names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.class_names = class_names


class DamagedError(DataError):
    """A packed picture is no longer what was packed.

    Attributes:
        problem: To be read behind the picture's key.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.problem = problem


def open_source(config: DataConfig, *, fetch: bool = True) -> Source:
    """Opens the data set that the config names.

    Args:
        config: Names it.
        fetch: Whether to fetch and prepare it where it comes from tensorflow-datasets and is not there yet.

    Raises:
        NotFetchedError: It is not there yet and `fetch` is False.
        DataError: The data cannot be had, or their layout is not understood. The message says what to do.
    """
    if config.source == "tfds":
        from pipeline.data.tfds import open_tfds

        return open_tfds(config.name or "", config.path or Path("data/tfds"), fetch=fetch)
    if config.source == "digits":
        return DigitsSource()
    assert config.path is not None  # the schema sees to it
    if config.source == "pack":
        from pipeline.data.pack import open_pack

        return open_pack(config.path)
    return open_folder(config.path) if config.source == "folder" else open_csv(config.path)


def listing(problems: Sequence[str], limit: int = 20) -> str:
    """The first problems, one on a line, and how many more there are."""
    rest = [f"  and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*(f"  {problem}" for problem in problems[:limit]), *rest])


class FileSource:
    """Image files under one root."""

    def __init__(self, root: Path, class_names: tuple[str, ...], samples: Sequence[Sample]) -> None:
        self.root, self.class_names = root, class_names
        # Millions of Python's strings and tuples would take several times the memory.
        kinds = (pa.string(), pa.int32(), pa.string())
        self._columns = [pa.array([sample[number] for sample in samples], kind) for number, kind in enumerate(kinds)]

    def samples(self) -> list[Sample]:
        return list(map(Sample, *(column.to_pylist() for column in self._columns)))

    def status(self, key: str) -> Status:
        status = (self.root / key).stat()
        return Status(status.st_size, status.st_mtime_ns)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def encoded(self, key: tf.Tensor) -> tf.Tensor:
        return tf.io.read_file(tf.strings.join([self.root.as_posix(), "/", key]))


class DigitsSource:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels, gray. No network, no files."""

    class_names = tuple("0123456789")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # 0..16 to 0..255; 8, the only value that falls between two integers, becomes 128 (rint rounds 127.5 to even)
        self._files = [_png(picture) for picture in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
        self._labels = [int(label) for label in digits.target]

    def samples(self) -> list[Sample]:
        return [Sample(str(i), label, None) for i, label in enumerate(self._labels)]

    def status(self, key: str) -> None:
        return None

    def read(self, key: str) -> bytes:
        return self._files[int(key)]

    def encoded(self, key: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.constant(self._files), tf.strings.to_number(key, tf.int32))


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def open_folder(root: Path) -> FileSource:
    """`<class>/<image>` or `{train,val,test}/<class>/<image>`; pictures may lie deeper inside a class. Links are followed.

    Hidden files and files without an image suffix are passed over.

    Raises:
        DataError: There is no such folder, no picture, a picture outside the classes, an empty class, or a mixture of layouts.
    """
    if not root.is_dir():
        raise DataError(
            f"data.path: {root} is {'a file, not a folder' if root.exists() else 'missing'}; give a folder that holds <class>/<image>"
        )
    parents = _class_parents(root)
    strays = [str(path) for parent in {root: None, **parents} for path in sorted(parent.iterdir()) if is_picture(path)]
    if strays:
        raise DataError(
            f"{len(strays)} pictures lie in no class folder:\n{listing(strays)}\n"
            "Expected <class>/<image> or {train,val,test}/<class>/<image>; move or delete them."
        )
    folders = [(split, folder) for parent, split in parents.items() for folder in _subfolders(parent)]
    names = sorted({folder.name for _, folder in folders})
    labels = {name: label for label, name in enumerate(names)}
    rows = [
        Sample(path.relative_to(root).as_posix(), labels[folder.name], split)
        for split, folder in folders
        for path in pictures_below(folder)
    ]
    if not rows:
        raise DataError(f"{root} holds no picture; expected <class>/<image> or {{train,val,test}}/<class>/<image>")
    empty = sorted(set(range(len(names))) - {row.label for row in rows})
    if empty:
        raise DataError(f"{len(empty)} class folders hold no picture:\n{listing([names[i] for i in empty])}\nFill or delete them.")
    unreadable = [ascii(row.key) for row in rows if not _is_utf8(row.key)]
    if unreadable:
        raise DataError(f"{len(unreadable)} file names are not UTF-8:\n{listing(unreadable)}\nRename them.")
    return FileSource(root, tuple(names), rows)


def _class_parents(root: Path) -> dict[Path, str | None]:
    """The folders that hold class folders, each with its split: the root itself, or its train, val and test."""
    folders = _subfolders(root)
    splits = [folder for folder in folders if folder.name in SPLIT_NAMES]
    others = [folder.name for folder in folders if folder.name not in SPLIT_NAMES]
    if others and len(splits) < 2:  # one alone may well be a class: train, bus, car
        return {root: None}
    if others:
        raise DataError(
            f"{root} holds both splits ({', '.join(f.name for f in splits)}) and other folders:\n{listing(others)}\nMove the others away."
        )
    named = [SPLIT_NAMES[folder.name] for folder in splits]
    doubled = [folder.name for folder in splits if named.count(SPLIT_NAMES[folder.name]) > 1]
    if doubled:
        raise DataError(f"{root} holds one split under two names: {', '.join(doubled)}; join them")
    return {split: SPLIT_NAMES[split.name] for split in splits} or {root: None}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_csv(path: Path) -> FileSource:
    """A CSV file with a header that has the columns path, label and, if the splits are given, split; others are ignored.

    Raises:
        DataError: The file cannot be read; or rows are wrong, all of which are listed with their line numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [(reader.line_num, {name: (row.get(name) or "").strip() for name in ("path", "label", "split")}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.path: {path} cannot be read as a CSV file in UTF-8: {error}") from None
    missing = [column for column in ("path", "label") if column not in columns]
    if missing:
        raise DataError(
            f"{path}: the header lacks {' and '.join(missing)}; it has {', '.join(map(repr, columns)) or 'nothing'}.\n"
            "Columns are separated by commas."
        )
    if not lines:
        raise DataError(f"{path}: has a header and no rows")

    has_splits = any(row["split"] for _, row in lines)
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, row in lines:
        key = _key(path.parent, row["path"])
        faults = []
        if not row["path"]:
            faults.append("the path is empty")
        elif not (path.parent / key).is_file():
            faults.append(f"there is no file {row['path']}")
        elif first.setdefault(key, number) != number:
            faults.append(f"{row['path']} stands in line {first[key]}, too")
        if not row["label"]:
            faults.append("the label is empty")
        if has_splits and row["split"] not in SPLIT_NAMES:
            faults.append(f"the split is {row['split']!r}; valid are train, val and test")
        problems += [f"line {number}: {fault}" for fault in faults]
    if problems:
        raise DataError(
            f"{path}: {len(problems)} things are wrong:\n{listing(problems)}\nPaths are relative to the folder of the CSV file."
        )
    names = sorted({row["label"] for _, row in lines})
    labels = {name: label for label, name in enumerate(names)}
    rows = [
        Sample(_key(path.parent, row["path"]), labels[row["label"]], SPLIT_NAMES[row["split"]] if has_splits else None) for _, row in lines
    ]
    return FileSource(path.parent, tuple(names), rows)


def _key(root: Path, path: str) -> str:
    return Path(os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)).as_posix()
