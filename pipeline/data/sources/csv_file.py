"""A CSV file that lists images, their labels and, where given, their splits."""

import codecs
import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.config.base import is_address
from pipeline.config.data import ColumnsConfig
from pipeline.console import command_line, plural
from pipeline.data.sources.base import LabeledImage, LayoutError, LayoutProblem, index_classes, split_of
from pipeline.data.sources.files import FileSource
from pipeline.errors import DataError, suggest

DELIMITERS = ",;\t|"
LABEL = "label"  # name of the column, unless the config names another


class _Row(NamedTuple):
    """A row of the file."""

    line: int
    path: str
    label: str
    split: str


def open_csv(path: Path, columns: ColumnsConfig | None = None, root: Path | None = None) -> FileSource:
    """Open a CSV file with columns for path, label and, if the splits are given, split; ignore others.

    Args:
        path: The file; see `read_images`.
        columns: Names of the columns; None for path, label and split.
        root: Folder that relative paths start from; None for that of the file.

    Raises:
        DataError: The file cannot be read.
        LayoutError: Rows are wrong; all are listed with their line numbers.
    """
    root = (path.parent if root is None else root).resolve()  # so that a way up from it leads where it seems to
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be read: {error.strerror}") from None

    def problem(text: str, key: str) -> str | None:
        if is_address(text):
            return f"{text} is an address, and training reads files of this machine"
        return None if (root / key).is_file() else f"there is no file {text}"

    hint = f"Relative paths start from {root}; data.root changes that."
    if b"://" in content:
        hint += (
            f"\nImages at addresses are packed first: {command_line('pack', '--csv', path, '--out', 'PACK')}; then "
            "data.source=pack data.path=PACK"
        )
    names, images, wrong = read_images(
        content, f"data.path: {path}", columns, lambda text: relative_key(root, text), problem, hint
    )
    source = FileSource(root, names, images)
    if wrong is not None:
        raise LayoutError([wrong], source)
    return source


def read_images(
    content: bytes,
    name: str,
    columns: ColumnsConfig | None,
    key_of: Callable[[str], str],
    problem: Callable[[str, str], str | None],
    hint: str,
) -> tuple[tuple[str, ...], list[LabeledImage], LayoutProblem | None]:
    """Return the class names and the images that a CSV file lists, and what is wrong in other rows.

    The delimiter is the comma, semicolon, tab or bar that the header contains most often. If all labels are integers,
    1 and 1.0 are the same class, and the classes are in the order of the numbers.

    Args:
        content: The file, in UTF-8, with or without a byte order mark, or in UTF-16 with one.
        name: Its path or address, for messages.
        columns: Names of the columns; None for path, label and split.
        key_of: Returns the key of an image by its path as written.
        problem: Returns why the image of a path and its key cannot be used, or None.
        hint: Last sentence of the message about rows that are wrong.

    Raises:
        DataError: The file is no such file.
    """
    rows = _read_rows(content, name, columns or ColumnsConfig())
    has_splits = any(row.split for row in rows)
    problems: list[str] = []
    valid: list[_Row] = []
    first: dict[str, int] = {}
    for row in rows:
        key = key_of(row.path)
        faults = []
        if not row.path:
            faults.append("the path is empty")
        elif (fault := problem(row.path, key)) is not None:
            faults.append(fault)
        elif first.setdefault(key, row.line) != row.line:
            faults.append(f"{row.path} is in line {first[key]}, too")
        if not row.label:
            faults.append("the label is empty")
        if has_splits and split_of(row.split) is None:
            faults.append(f"the split is {row.split!r}; valid are train, val and test")
        if not faults:
            valid.append(row)
        problems += [f"line {row.line}: {fault}" for fault in faults]
    names, labels = index_classes([row.label for row in valid])
    images = [
        LabeledImage(key_of(row.path), label, split_of(row.split) if has_splits else None)
        for row, label in zip(valid, labels, strict=True)
    ]
    text = f"{name}: {plural(len(problems), 'thing is', 'things are')} wrong"
    return names, images, LayoutProblem(text, tuple(problems), hint) if problems else None


def _read_rows(content: bytes, source: str, columns: ColumnsConfig) -> list[_Row]:
    label = columns.label or LABEL
    try:
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        with io.TextIOWrapper(io.BytesIO(content), encoding=encoding, newline="") as file:
            delimiter = max(DELIMITERS, key=re.sub(r'"[^"]*"', "", file.readline()).count)  # names may be quoted
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            header = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [
                _Row(
                    reader.line_num,
                    *((row.get(name) or "").strip() for name in (columns.path, label, columns.split)),
                )
                for row in reader
                if any(row.values())  # spreadsheets write rows of delimiters alone
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} cannot be read as a CSV file in UTF-8: {error}") from None
    for key, name in (("path", columns.path), ("label", label)):
        if name not in header:
            raise DataError(
                f"{source}: the header has no column {name!r}; it has {', '.join(map(repr, header)) or 'nothing'}. "
                f"Set data.columns.{key} (in pack: --columns {key}=NAME) to the column that is meant"
                f"{suggest(name, header)}"
            )
    if not rows:
        raise DataError(f"{source} has a header and no rows")
    return rows


def relative_key(root: Path, path: str) -> str:
    """Return the key of an image by its path as written, absolute or relative to the root."""
    return Path(os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)).as_posix()
