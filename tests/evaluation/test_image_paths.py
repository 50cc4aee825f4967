"""The image paths that a command line names."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.image_paths import image_paths


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(*words: str, stdin: bytes = b"") -> list[str]:
    return [str(path) for path in image_paths(words, io.BytesIO(stdin))]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the folder images in it."""
    monkeypatch.chdir(tmp_path)
    touch(
        tmp_path,
        *(
            f"images/{name}"
            for name in ("b.JPG", "a/2.png", "a/1.heic", "c.txt", ".d.jpg", ".e/f.jpg", "__MACOSX/g.jpg")
        ),
    )
    return tmp_path


def test_a_folder_gives_the_images_below_it_in_the_order_of_names(images: Path) -> None:
    assert found("images") == found("./images/") == ["images/a/1.heic", "images/a/2.png", "images/b.JPG"]


def test_a_glob_gives_every_file_that_matches(images: Path) -> None:
    assert sorted(found("images/**/*.[pJ]*")) == ["images/a/2.png", "images/b.JPG"]
    assert found("images/?.txt") == ["images/c.txt"], "whatever its suffix: it was asked for"
    assert sorted(found(f"{images}/images/*")) == [f"{images}/images/{name}" for name in ("b.JPG", "c.txt")], (
        "no folders"
    )


def test_a_name_that_looks_like_a_glob_is_a_file_where_there_is_one(images: Path) -> None:
    touch(images, "x[1].png", "x1.png")
    assert found("x[1].png") == ["x[1].png"]
    (images / "x[1].png").unlink()
    assert found("x[1].png") == ["x1.png"]


def test_standard_input_gives_a_path_a_line_unchecked() -> None:
    assert found("-", stdin=b"a b.png\r\n\nnone/c.png\n\xff.png") == ["a b.png", "none/c.png", os.fsdecode(b"\xff.png")]


def test_words_are_taken_in_their_order(images: Path) -> None:
    assert found("images/c.txt", "-", "images/a", stdin=b"x\n") == [
        "images/c.txt",
        "x",
        "images/a/1.heic",
        "images/a/2.png",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images", "x.jpg", "-", "y.jpg"], r"^x\.jpg: there is no such file \(2 are missing\)$"),
        (["images", "images/*.gif"], r"^images/\*\.gif: no file matches$"),
        (["images/.e/..", "images/empty"], r"^images/empty: the folder contains no image$"),
    ],
)
def test_a_word_that_names_no_image_is_refused_at_once(images: Path, words: list[str], message: str) -> None:
    touch(images, "images/empty/notes.txt")
    with pytest.raises(UserError, match=message):
        image_paths(words, io.BytesIO())


def test_a_folder_that_cannot_be_listed_is_left_to_be_reported(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: Path) -> Iterator[os.DirEntry]:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    assert found("images") == ["images/a", "images/b.JPG"]


def test_folders_and_lists_are_read_no_further_than_asked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(images, *(f"many/{folder:02}/{number}.jpg" for folder in range(30) for number in range(2)))
    scandir, listed, asked = os.scandir, [], 0

    def counted(path: Path) -> Iterator[os.DirEntry]:
        listed.append(path)
        return scandir(path)

    def lines() -> Iterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield b"x.jpg\n"

    monkeypatch.setattr("os.scandir", counted)
    paths = image_paths(["many", "many/**/*.jpg", "-"], lines())
    assert str(next(paths)) == "many/00/0.jpg"
    assert len(listed) < 10
    for _ in range(2 * 60):
        last = next(paths)
    assert (str(last), asked) == ("x.jpg", 1)
