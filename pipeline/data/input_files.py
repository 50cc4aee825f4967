"""Large files, such as TFRecord files and tar shards, as an input of packing.

They are read one after the other, from their beginning to their end.
"""

import glob
import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.base import is_address
from pipeline.console import plural
from pipeline.data import remote
from pipeline.data.pack_inputs import PackRecord
from pipeline.data.sources.base import format_list, split_of
from pipeline.errors import DataError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class InputFile:
    """A file that is packed.

    Attributes:
        address: Path on this machine, or address.
        split: train, val or test; None if the data have no splits.
    """

    address: str
    split: str | None

    @property
    def name(self) -> str:
        """The prefix of the keys of the file's images."""
        name = remote.file_name(self.address)
        return f"{self.split}/{name}" if self.split else name

    def state(self) -> str:
        """Return a text that changes with the file.

        Raises:
            DataError: The file is at an address that cannot be reached.
        """
        if is_address(self.address):
            return remote.state(self.address)
        status = Path(self.address).stat()
        return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


class FilesInput:
    """Files that hold images and labels, as an input of packing; `read_file` reads one of them.

    An image's key: `<split>/<file>/<number in the file>/<its own name, if any>`.

    Attributes:
        identity: See `pack_inputs.PackInput`.
        settings: See `pack_inputs.PackInput`.
        total: See `pack_inputs.PackInput`.
    """

    option: str
    """Option of the command line that names the files."""
    total = None

    def __init__(self, files: Sequence[InputFile], class_names: Sequence[str] | None, first_label: int | None) -> None:
        """Create the input.

        Args:
            files: The files in the order of the pack.
            class_names: In the order of the labels; None takes them from the files.
            first_label: The label of the first class: 0, or 1 where 0 is left to a background class; None takes 0, and
                refuses data for which that may be wrong.
        """
        self._files, self._names, self._first = files, class_names, first_label
        self._copies = tempfile.TemporaryDirectory(prefix="pack-")
        self._copied: InputFile | None = None
        self.identity: dict[str, Any] = {file.name: file.state() for file in files}
        self.settings = {
            "first label": first_label or 0,
            "digest of class names": hashlib.sha256("\n".join(class_names).encode()).hexdigest()
            if class_names
            else None,
        }

    def read_file(self, file: InputFile, skip: int) -> Iterator[PackRecord]:
        """Yield the images of a file, from number `skip` on.

        Raises:
            DataError: The file is damaged, or an image has no label.
        """
        raise NotImplementedError

    def records(self, start: int, last: str | None) -> Iterator[PackRecord]:
        """Yield the records in the order of the pack."""
        del start
        first, skip = 0, 0
        if last is not None:
            first = next(i for i, file in enumerate(self._files) if last.startswith(file.name + "/"))
            skip = int(last.removeprefix(self._files[first].name + "/").partition("/")[0]) + 1
        for file in self._files[first:]:
            yield from self.read_file(file, skip)
            skip = 0

    def changes(self, rows: pa.Table) -> list[str]:
        """Return no changes: the sizes and versions of the files are part of the identity."""
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

    def check_label(self, label: int, where: str) -> None:
        """Check that a label is one of the classes, as far as they are known.

        Raises:
            DataError: It is not; the message begins with `where`.
        """
        first, classes = self._first or 0, len(self._names) if self._names else np.iinfo(np.int32).max
        if not first <= label < first + classes:
            hint = (
                "; do they count from 1? Then say --first-label 1" if label == classes and self._first is None else ""
            )
            raise DataError(f"{where} has the label {label}; valid are {first} to {first + classes - 1}{hint}")

    def local_path(self, file: InputFile) -> Path:
        """Return the path of a file on this machine; of a file at an address, that of a copy.

        There is one copy at a time: the last one is deleted.

        Raises:
            DataError: The file cannot be read from its address.
        """
        if not is_address(file.address):
            return Path(file.address)
        path = Path(self._copies.name) / "copy"
        if self._copied != file:
            self._copied = None
            path.unlink(missing_ok=True)
            remote.download(file.address, path)
            self._copied = file
        return path


def find_files(
    option: str, words: Sequence[str], suffixes: tuple[str, ...] = (), *, split_by_name: bool = False
) -> list[InputFile]:
    """Find the files that a command line names.

    Args:
        option: Option that the words follow, for messages.
        words: Paths or addresses, as in `train=FOLDER/train-*` or without the split, all with or all without. They may
            have *, and braces as in {000..012} or {a,b}.
        suffixes: Where given, a folder stands for the files in it that have one of them.
        split_by_name: Whether a file without a split is of the split that its name begins with, or that its folder is
            named after.

    Returns:
        The files in the order of the words, then of their names.

    Raises:
        DataError: There is no such file, a file is given twice, or only some of the files have a split.
    """
    files: list[InputFile] = []
    for word in words:
        name, given, pattern = word.partition("=")
        if is_address(name):  # the sign is part of an address
            given = ""
        if given and split_of(name) is None:
            raise DataError(f"{option} {word}: the split is {name!r}; valid are train, val and test")
        found = [address for each in expand_braces(pattern if given else word) for address in _matches(each, suffixes)]
        if not found:
            raise DataError(f"{option} {word}: there is no such file")
        for address in found:
            files.append(InputFile(address, split_of(name if given else _split_name(address) if split_by_name else "")))
    if len({file.split is None for file in files}) > 1:
        raise DataError(f"{option}: give the split of all files, as in train=FOLDER/train-*, or of none")
    names = [file.name for file in files]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(
            f"{option}: {plural(len(doubled), 'file is', 'files are')} given twice, or have the same name:\n"
            f"{format_list(doubled)}\nRename them."
        )
    return files


def expand_braces(pattern: str) -> list[str]:
    """Return the texts that a pattern stands for: {000..012} are numbers of three digits, {a,b} are words."""
    literals, groups = BRACES.split(pattern)[::2], BRACES.findall(pattern)
    choices = []
    for group in groups:
        if match := RANGE.fullmatch(group):
            first, last = int(match[1]), int(match[2])
            choices.append([f"{number:0{len(match[1])}}" for number in range(first, last + 1)])
        else:
            choices.append(group.split(",") if "," in group else [f"{{{group}}}"])
    return [
        "".join(itertools.chain.from_iterable(zip(literals, (*words, ""), strict=True)))
        for words in itertools.product(*choices)
    ]


def _matches(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the paths or addresses that a pattern stands for, sorted."""
    if is_address(pattern):
        if suffixes and not pattern.endswith(suffixes) and "*" not in pattern:
            return [name for name in remote.glob(pattern.rstrip("/") + "/*") if name.endswith(suffixes)]
        return remote.glob(pattern) if "*" in pattern else [pattern]
    path = Path(pattern).expanduser()
    if suffixes and path.is_dir():
        return sorted(str(each) for each in path.rglob("*") if each.name.endswith(suffixes) and each.is_file())
    # Path.glob takes no absolute pattern; the name of a file may have a bracket in it.
    names = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))  # noqa: PTH207
    return [name for name in names if Path(name).is_file()]


def _split_name(address: str) -> str:
    """Return the word that may name the split of a file: the first one of its name, or else its folder."""
    first = re.split(r"[^A-Za-z]", remote.file_name(address), maxsplit=1)[0]
    return first if split_of(first) else remote.file_name(remote.parent(address))


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
