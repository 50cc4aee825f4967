"""An image folder: `<class>/<image>` or `{train,val,test}/<class>/<image>`."""

from collections import Counter
from itertools import islice
from pathlib import Path

from pipeline.console import plural
from pipeline.data.image_files import is_hidden, is_image_file, iter_image_files
from pipeline.data.sources.base import LabeledImage, LayoutError, LayoutProblem, format_list, split_of
from pipeline.data.sources.files import FileSource
from pipeline.errors import DataError


def open_folder(root: Path) -> FileSource:
    """Open a folder `<class>/<image>` or `{train,val,test}/<class>/<image>`; links are followed.

    Images may lie deeper inside a class. Hidden files and files without an image suffix are skipped.

    Raises:
        DataError: There is no such folder, no image in a class, or a mixture of layouts.
        LayoutError: Images lie outside the classes, classes are empty, or file names are not UTF-8; all are listed.
    """
    if not root.is_dir():
        raise DataError(
            f"data.path: {root} is {'a file, not a folder' if root.exists() else 'missing'}; give a folder that holds "
            "<class>/<image>"
        )
    parents = _class_parents(root)
    strays = [
        str(path) for parent in {root: None, **parents} for path in sorted(parent.iterdir()) if is_image_file(path)
    ]
    problems = []
    if strays:
        text = f"{plural(len(strays), 'image lies', 'images lie')} in no class folder"
        remedy = "Expected <class>/<image> or {train,val,test}/<class>/<image>; move or delete them."
        problems.append(LayoutProblem(text, tuple(strays), remedy))
    folders = [(split, folder) for parent, split in parents.items() for folder in _subfolders(parent)]
    names = sorted({folder.name for _, folder in folders})
    labels = {name: label for label, name in enumerate(names)}
    skipped: Counter[str] = Counter()
    rows = [
        LabeledImage(path.relative_to(root).as_posix(), labels[folder.name], split)
        for split, folder in folders
        for path in iter_image_files(folder, skipped)
    ]
    if not rows:
        if problems:
            raise LayoutError(problems, FileSource(root, tuple(names), rows))
        raise DataError(f"{root} holds no image; expected <class>/<image> or {{train,val,test}}/<class>/<image>")
    empty = sorted(set(range(len(names))) - {row.label for row in rows})
    if empty:
        text = f"{plural(len(empty), 'class folder holds', 'class folders hold')} no image"
        problems.append(LayoutProblem(text, tuple(names[i] for i in empty), "Fill or delete them."))
    unreadable = [ascii(row.key) for row in rows if not _is_utf8(row.key)]
    if unreadable:
        text = f"{plural(len(unreadable), 'file name is', 'file names are')} not UTF-8"
        problems.append(LayoutProblem(text, tuple(unreadable), "Rename them."))
    source = FileSource(root, tuple(names), [row for row in rows if _is_utf8(row.key)], skipped)
    if problems:
        raise LayoutError(problems, source)
    return source


def _class_parents(root: Path) -> dict[Path, str | None]:
    """Return the folders that hold class folders, each with its split: the root itself, or its train, val and test."""
    folders = _subfolders(root)
    splits = {folder: split for folder in folders if (split := split_of(folder.name)) is not None}
    others = [folder.name for folder in folders if folder not in splits]
    # One alone may well be a class (train, bus, car), unless its images lie in folders of their own.
    if not splits or (others and len(splits) < 2 and not any(map(_holds_classes, splits))):
        if len(folders) == 1 and _holds_classes(folders[0]):
            raise DataError(
                f"{root} holds the single folder {folders[0].name}, whose folders look like the classes; "
                f"give data.path={folders[0]}"
            )
        return {root: None}
    if others:
        raise DataError(
            f"{root} holds both splits ({', '.join(folder.name for folder in splits)}) and other "
            f"folders:\n{format_list(others)}\nMove the others away."
        )
    named = list(splits.values())
    doubled = [folder.name for folder, split in splits.items() if named.count(split) > 1]
    if doubled:
        raise DataError(f"{root} holds one split under two names: {', '.join(doubled)}; join them")
    return dict(splits)


def _holds_classes(folder: Path) -> bool:
    """Return True if a folder has no image of its own and at least two subfolders with images."""
    if any(is_image_file(path) for path in folder.iterdir()):
        return False
    with_images = (path for path in _subfolders(folder) if next(iter_image_files(path), None) is not None)
    return len(list(islice(with_images, 2))) == 2


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
