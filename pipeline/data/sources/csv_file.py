"""A CSV file that lists images, their labels and, where given, their splits."""

import csv
import os
from pathlib import Path

from pipeline.data.sources.base import SPLIT_NAMES, LabeledImage, format_list
from pipeline.data.sources.files import FileSource
from pipeline.errors import DataError


def open_csv(path: Path) -> FileSource:
    """Open a CSV file with the columns path, label and, if the splits are given, split; ignore others.

    Raises:
        DataError: The file cannot be read; or rows are wrong, all of which are listed with their line numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [
                (reader.line_num, {name: (row.get(name) or "").strip() for name in ("path", "label", "split")})
                for row in reader
            ]
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
            faults.append(f"{row['path']} is in line {first[key]}, too")
        if not row["label"]:
            faults.append("the label is empty")
        if has_splits and row["split"] not in SPLIT_NAMES:
            faults.append(f"the split is {row['split']!r}; valid are train, val and test")
        problems += [f"line {number}: {fault}" for fault in faults]
    if problems:
        raise DataError(
            f"{path}: {len(problems)} things are wrong:\n{format_list(problems)}\nPaths are relative to the folder of "
            "the CSV file."
        )
    names = sorted({row["label"] for _, row in lines})
    labels = {name: label for label, name in enumerate(names)}
    rows = [
        LabeledImage(
            _key(path.parent, row["path"]), labels[row["label"]], SPLIT_NAMES[row["split"]] if has_splits else None
        )
        for _, row in lines
    ]
    return FileSource(path.parent, tuple(names), rows)


def _key(root: Path, path: str) -> str:
    return Path(os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)).as_posix()
