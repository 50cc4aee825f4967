"""A CSV file that lists images, their labels and, where given, their splits."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.data import CsvColumnsConfig
from pipeline.console import plural
from pipeline.data.sources.base import LabeledImage, LayoutError, LayoutProblem, split_of
from pipeline.data.sources.files import FileSource
from pipeline.errors import DataError, suggest

DELIMITERS = ",;\t|"
INTEGER = r"[+-]?(0|[1-9]\d*)(\.0*)?"  # 1 and 1.0, but not 01


class _Row(NamedTuple):
    """A row of the file."""

    line: int
    path: str
    label: str
    split: str


def open_csv(path: Path, columns: CsvColumnsConfig | None = None, root: Path | None = None) -> FileSource:
    """Open a CSV file with columns for path, label and, if the splits are given, split; ignore others.

    The delimiter is the comma, semicolon, tab or bar that the header contains most often. If all labels are integers,
    1 and 1.0 are the same class, and the classes are in the order of the numbers.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        columns: Names of the columns; None for path, label and split.
        root: Folder that relative paths start from; None for that of the file.

    Raises:
        DataError: The file cannot be read.
        LayoutError: Rows are wrong; all are listed with their line numbers.
    """
    columns = columns or CsvColumnsConfig()
    root = (path.parent if root is None else root).resolve()  # so that a way up from it leads where it seems to
    rows = _read_rows(path, columns)
    has_splits = any(row.split for row in rows)
    problems: list[str] = []
    valid: list[_Row] = []
    first: dict[str, int] = {}
    for row in rows:
        key = _key(root, row.path)
        faults = []
        if not row.path:
            faults.append("the path is empty")
        elif not (root / key).is_file():
            faults.append(f"there is no file {row.path}")
        elif first.setdefault(key, row.line) != row.line:
            faults.append(f"{row.path} is in line {first[key]}, too")
        if not row.label:
            faults.append("the label is empty")
        if has_splits and split_of(row.split) is None:
            faults.append(f"the split is {row.split!r}; valid are train, val and test")
        if not faults:
            valid.append(row)
        problems += [f"line {row.line}: {fault}" for fault in faults]
    names, labels = _classes([row.label for row in valid])
    images = [
        LabeledImage(_key(root, row.path), label, split_of(row.split) if has_splits else None)
        for row, label in zip(valid, labels, strict=True)
    ]
    source = FileSource(root, names, images)
    if problems:
        text = f"{path}: {plural(len(problems), 'thing is', 'things are')} wrong"
        remedy = f"Relative paths start from {root}; data.root changes that."
        raise LayoutError([LayoutProblem(text, tuple(problems), remedy)], source)
    return source


def _read_rows(path: Path, columns: CsvColumnsConfig) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(DELIMITERS, key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            header = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [
                _Row(
                    reader.line_num,
                    *((row.get(name) or "").strip() for name in (columns.path, columns.label, columns.split)),
                )
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.path: {path} cannot be read as a CSV file in UTF-8: {error}") from None
    for key, name in (("path", columns.path), ("label", columns.label)):
        if name not in header:
            raise DataError(
                f"{path}: the header has no column {name!r}; it has {', '.join(map(repr, header)) or 'nothing'}. "
                f"Set data.columns.{key} to the column that is meant{suggest(name, header)}"
            )
    if not rows:
        raise DataError(f"{path}: has a header and no rows")
    return rows


def _classes(labels: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names in order, and the class of each label."""
    if all(re.fullmatch(INTEGER, label) for label in set(labels)):
        numbers = [int(float(label)) for label in labels]
        values = sorted(set(numbers))
        positions = {value: position for position, value in enumerate(values)}
        return tuple(map(str, values)), [positions[number] for number in numbers]
    names = sorted(set(labels))
    index = {name: position for position, name in enumerate(names)}
    return tuple(names), [index[label] for label in labels]


def _key(root: Path, path: str) -> str:
    return Path(os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)).as_posix()
