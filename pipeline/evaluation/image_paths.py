"""The pictures that a command line names: files, folders, globs, and lists on standard input. Loads no library."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from pipeline.data.image_files import pictures_below
from pipeline.errors import UserError

STDIN = "-"


def picture_paths(words: Sequence[str], stdin: Iterable[bytes]) -> Iterator[Path]:
    """Finds the pictures one after the other, as they are asked for.

    Args:
        words: Each a file; a folder, which is searched to its bottom, in the order of its names; a glob as the module `glob` reads it,
            `**` included, of which all files count, in the order in which the file system lists them; or `-`, for `stdin`.
        stdin: Lines, each a path. Read no further than it is asked for, and not checked: a path of a long list may well have gone.

    Raises:
        UserError: At once, if a word names no file, or a folder or glob no picture.
    """
    missing = [word for word in words if word != STDIN and not _is_glob(word) and not Path(word).exists()]
    if missing:
        raise UserError(
            f"{missing[0]}: there is no such file" + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
        )
    return chain.from_iterable([_of_word(word, stdin) for word in words])


def _of_word(word: str, stdin: Iterable[bytes]) -> Iterator[Path]:
    if word == STDIN:
        return (Path(os.fsdecode(path)) for line in stdin if (path := line.rstrip(b"\r\n")))
    if _is_glob(word):
        matches = map(Path, glob.iglob(word, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern, and hidden files
        found = (path for path in matches if not path.is_dir())
        return _not_none(found, f"{word}: no file matches")
    if Path(word).is_dir():
        return _not_none(pictures_below(Path(word)), f"{word}: the folder holds no picture")
    return iter((Path(word),))


def _is_glob(word: str) -> bool:
    """Whether a word is a pattern, and not the name of a file that happens to hold a `[`."""
    return glob.escape(word) != word and not Path(word).exists()


def _not_none(paths: Iterator[Path], otherwise: str) -> Iterator[Path]:
    first = next(paths, None)
    if first is None:
        raise UserError(otherwise)
    return chain((first,), paths)
