"""Image files in folders. The module loads no library, so that a wrong path is reported at once."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# All image formats, also those that cannot be decoded: they are reported, not skipped.
IMAGE_SUFFIXES = tuple(
    f".{name}"
    for names in (
        "jpg jpeg jpe jfif png gif bmp dib webp",
        "tif tiff heic heif hif avif avifs jxl jp2 j2k j2c jpx jpf ppm pgm pbm pnm tga apng qoi pcx sgi dds ico icns",
        "psd dng cr2 nef arw raw",
    )
    for name in names.split()
)


def iter_image_files(folder: Path, skipped: Counter[str] | None = None) -> Iterator[Path]:
    """Yield the image files in a folder and its subfolders, in the order of their names. Links are followed.

    The names of one folder at a time are in memory. Hidden files, files without an image suffix and links back to a
    parent folder are skipped. A folder that cannot be listed is yielded as if it were an image: reading it reports why.

    Args:
        folder: The folder.
        skipped: Counts the visible files without an image suffix, by their suffix.
    """
    return _walk(folder, (folder.resolve(),), Counter() if skipped is None else skipped)


def _walk(folder: Path, trail: tuple[Path, ...], skipped: Counter[str]) -> Iterator[Path]:
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
                yield from _walk(path, (*trail, real), skipped)
        elif is_image_file(path):
            yield path
        elif not is_hidden(entry.name):
            skipped[path.suffix.lower()] += 1


def is_image_file(path: Path) -> bool:
    """Return whether a path is a visible file with an image suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name) and not path.is_dir()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden."""
    return name.startswith(".") or name == "__MACOSX"
