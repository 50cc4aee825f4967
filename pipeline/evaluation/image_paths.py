"""Image paths named on a command line: files, folders, globs and lists on standard input.

This module loads no heavy library.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from pipeline.data.image_files import iter_image_files
from pipeline.errors import UserError

STDIN = "-"


def image_paths(arguments: Sequence[str], stdin: Iterable[bytes]) -> Iterator[Path]:
    """Find the images lazily, one after the other.

    Args:
        arguments: Each one is a file; a folder, which is searched recursively in the order of names; a glob of the
            module `glob`, including `**`, of which all files count, in the order of the file system; or `-` for
            `stdin`.
        stdin: Lines, each a path. They are read lazily and not checked: a path of a long list may have been deleted.

    Raises:
        UserError: Immediately, if an argument names no file, or a folder or glob contains no image.
    """
    missing = [each for each in arguments if each != STDIN and not _is_glob(each) and not Path(each).exists()]
    if missing:
        raise UserError(
            f"{missing[0]}: there is no such file" + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
        )
    return chain.from_iterable([_expand(argument, stdin) for argument in arguments])


def _expand(argument: str, stdin: Iterable[bytes]) -> Iterator[Path]:
    if argument == STDIN:
        return (Path(os.fsdecode(path)) for line in stdin if (path := line.rstrip(b"\r\n")))
    if _is_glob(argument):
        matches = map(Path, glob.iglob(argument, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern, and hidden files
        files = (path for path in matches if not path.is_dir())
        return _require_one(files, f"{argument}: no file matches")
    if Path(argument).is_dir():
        return _require_one(iter_image_files(Path(argument)), f"{argument}: the folder contains no image")
    return iter((Path(argument),))


def _is_glob(argument: str) -> bool:
    """Return whether an argument is a pattern, not the name of a file that happens to contain a `[`."""
    return glob.escape(argument) != argument and not Path(argument).exists()


def _require_one(paths: Iterator[Path], message: str) -> Iterator[Path]:
    first = next(paths, None)
    if first is None:
        raise UserError(message)
    return chain((first,), paths)
