"""Which files of a folder are pictures. Loads no library, so that a wrong path is answered at once."""

import os
from collections.abc import Iterator
from pathlib import Path

# All that is meant as a picture, also what cannot be decoded: that is reported, not passed over.
IMAGE_SUFFIXES = tuple(
    f".{name}"
    for names in (
        "jpg jpeg jpe jfif png gif bmp dib webp",
        "tif tiff heic heif avif jxl jp2 j2k ppm pgm pbm pnm tga ico psd dng cr2 nef arw raw",
    )
    for name in names.split()
)


def pictures_below(folder: Path) -> Iterator[Path]:
    """Pictures in a folder and below it, in the order of their names, one folder's names in memory at a time. Links are followed.

    Hidden files and files without an image suffix are passed over, and so is a link back to a folder on the way. A
    folder that cannot be listed is given as if it were a picture: who reads it learns why.
    """
    return _walk(folder, (folder.resolve(),))


def _walk(folder: Path, trail: tuple[Path, ...]) -> Iterator[Path]:
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir():
            real = path.resolve() if entry.is_symlink() else path
            if not is_hidden(entry.name) and real not in trail:
                yield from _walk(path, (*trail, real))
        elif is_picture(path):
            yield path


def is_picture(path: Path) -> bool:
    """Whether a path is a visible file with an image suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and not path.is_dir()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not meant to be seen."""
    return name.startswith(".") or name == "__MACOSX"
