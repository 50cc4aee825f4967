"""Data sets that exist as TFRecord are packed with the labels and names that they have, or refused."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from fake_console import FakeConsole
from PIL import Image

from pipeline.cli.pack import main
from pipeline.config.data import DataConfig
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.pack import open_pack
from pipeline.errors import DataError


def encoded(seed: int) -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def example(**values: Any) -> bytes:
    """Features by name, `__` for a slash; text and bytes, numbers, or lists of them."""
    features = {}
    for name, given in values.items():
        items = given if isinstance(given, list) else [given]
        texts = [item.encode() if isinstance(item, str) else item for item in items]
        numeric = all(isinstance(item, int) for item in items)
        kind = (
            {"int64_list": tf.train.Int64List(value=items)}
            if numeric
            else {"bytes_list": tf.train.BytesList(value=texts)}
        )
        features[name.replace("__", "/")] = tf.train.Feature(**kind)
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def official(seed: int, label: int, name: str | None = None) -> bytes:
    """As the TPU's ImageNet has it."""
    names = {} if name is None else {"image__class__text": name}
    return example(image__encoded=encoded(seed), image__class__label=label, image__filename=f"n{seed}.JPEG", **names)


def write(path: Path, records: Sequence[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def run(*words: str | Path) -> str:
    console = FakeConsole()
    assert main(console, [str(word) for word in words]) == 0
    return console.output


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two files of train and one of validation; labels from 1, with their names."""
    names = {1: "tench", 2: "goldfish", 3: "shark"}
    for number in range(2):
        labels = [1 + (number + i) % 3 for i in range(5)]
        write(
            tmp_path / f"train-{number:05}-of-00002",
            [official(10 * number + i, lab, names[lab]) for i, lab in enumerate(labels)],
        )
    write(tmp_path / "validation-00000-of-00001", [official(90 + i, 1 + i, names[1 + i]) for i in range(3)])
    return tmp_path


def splits(folder: Path) -> tuple[str, str]:
    return f"train={folder}/train-*", f"validation={folder}/validation-*"


def test_the_official_layout_is_packed_with_names_and_splits(imagenet: Path) -> None:
    run("--tfrecord", *splits(imagenet), "--first-label", "1", "--out", imagenet / "pack")
    source = open_source(DataConfig(source="pack", path=imagenet / "pack"))
    assert source.class_names == ("tench", "goldfish", "shark")
    samples = source.list_images()
    assert samples[0] == ("train/train-00000-of-00002/0/n0.JPEG", 0, "train")
    assert samples[7] == ("train/train-00001-of-00002/2/n12.JPEG", 0, "train")
    assert [sample.split for sample in samples] == ["train"] * 10 + ["val"] * 3
    assert source.read(samples[7].key) == encoded(12)
    assert [sample.label for sample in samples[10:]] == [0, 1, 2]


def test_labels_that_may_count_from_1_are_not_guessed_and_nothing_is_written_twice(imagenet: Path) -> None:
    words = ["--tfrecord", *splits(imagenet), "--out", imagenet / "pack", "--shard-images", "4"]
    with pytest.raises(DataError, match=r"The smallest label is 1. If the labels count from 1, add --first-label 1"):
        run(*words)
    shard = imagenet / "pack/.packing/00000.array_record"
    before = shard.stat()
    run(*words, "--first-label", "1")
    after = (imagenet / "pack/pack-00000-of-00004.array_record").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "is intact" in run(*words, "--first-label", "1")
    with pytest.raises(DataError, match=r"first label: was 1, is 0"):
        run(*words)


def test_a_label_that_the_list_of_classes_lacks_is_refused_with_the_likely_reason(
    imagenet: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\n")
    words = ["--tfrecord", *splits(imagenet), "--out", imagenet / "pack", "--classes", tmp_path / "names.txt"]
    with pytest.raises(
        DataError, match=r"train-00000-of-00002: record 2 has the label 3; valid are 0 to 2; do they count from 1\?"
    ):
        run(*words)
    run(*words, "--first-label", "1")
    assert open_pack(imagenet / "pack").class_names == ("tench", "goldfish", "shark")


def test_labels_from_0_need_no_option(tmp_path: Path) -> None:
    write(tmp_path / "a", [official(i, i % 2, ("cat", "dog")[i % 2]) for i in range(4)])
    run("--tfrecord", tmp_path / "a", "--out", tmp_path / "pack")
    source = open_pack(tmp_path / "pack")
    assert source.class_names == ("cat", "dog")
    assert source.list_images()[1] == ("a/1/n1.JPEG", 1, None)


def test_a_record_of_tensorflow_datasets_is_known_and_takes_its_names_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "dots-train.tfrecord-00000-of-00001", [example(image=encoded(i), label=i % 2) for i in range(4)])
    (tmp_path / "label.labels.txt").write_text("odd\neven\n")
    words = ["--tfrecord", tmp_path / "dots-train*", "--out", tmp_path / "pack"]
    with pytest.raises(DataError, match=r"(?s)has no text to call its class by .*label\.labels\.txt"):
        run(*words)
    run(*words, "--classes", tmp_path / "label.labels.txt")
    assert open_pack(tmp_path / "pack").read("dots-train.tfrecord-00000-of-00001/3") == encoded(3)


def test_features_may_have_other_names(tmp_path: Path) -> None:
    write(tmp_path / "a", [example(jpeg=encoded(i), y=i % 2, wnid=f"n{i % 2}") for i in range(4)])
    with pytest.raises(
        DataError, match=r"record 0 has no bytes image/encoded or no number image/class/label; it has jpeg, wnid, y"
    ):
        run("--tfrecord", tmp_path / "a", "--out", tmp_path / "pack")
    options = ("--image-feature", "jpeg", "--label-feature", "y", "--class-feature", "wnid")
    run("--tfrecord", tmp_path / "a", "--out", tmp_path / "pack", *options)
    assert open_pack(tmp_path / "pack").class_names == ("n0", "n1")


def test_packing_goes_on_in_the_middle_of_a_file(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--tfrecord", *splits(imagenet), "--first-label", "1", "--shard-images", "4"]
    run(*words, "--out", imagenet / "whole")
    content = (imagenet / "train-00001-of-00002").read_bytes()
    status = (imagenet / "train-00001-of-00002").stat()
    damaged = bytearray(content)
    damaged[-100] ^= 1  # in its last record
    (imagenet / "train-00001-of-00002").write_bytes(damaged)
    os.utime(imagenet / "train-00001-of-00002", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"train-00001-of-00002 is damaged, or no uncompressed TFRecord file: corrupted record"
    ):
        run(*words, "--out", imagenet / "pack")
    (imagenet / "train-00001-of-00002").write_bytes(content)
    os.utime(imagenet / "train-00001-of-00002", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "written  5 images" in run(*words, "--out", imagenet / "pack")
    for path in (imagenet / "whole").iterdir():
        assert path.read_bytes() == (imagenet / "pack" / path.name).read_bytes()


def test_files_that_have_changed_are_refused(imagenet: Path) -> None:
    words = ["--tfrecord", *splits(imagenet), "--first-label", "1", "--out", imagenet / "pack"]
    run(*words)
    write(imagenet / "train-00001-of-00002", [official(1, 1, "tench")])
    with pytest.raises(DataError, match=r"train/train-00001-of-00002: was \d+ bytes, .*, is \d+ bytes"):
        run(*words)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([official(0, 0, "cat"), official(1, 0, "dog")], "label 0 is called 'cat' and 'dog'"),
        ([official(0, 0, "cat"), official(1, 2, "dog")], "label 1: has no image that would name it"),
        ([official(0, 0, "cat"), official(1, 1, "cat")], "labels 0 and 1 are both called 'cat'"),
        ([official(0, 0, "cat"), official(1, 1)], "label 1: an image of it gives no name"),
        ([official(0, 0, "cat"), official(1, -1, "dog")], "record 1 has the label -1"),
        ([official(0, 0, "cat"), official(1, 2**40, "dog")], "record 1 has the label 1099511627776"),
        ([official(0, 0, "cat"), b"no example"], "record 1 has no bytes image/encoded"),
        (
            [official(0, 0, "cat"), example(image__encoded=encoded(1), image__class__label=[0, 1])],
            "1 image and 2 labels",
        ),
        ([example(image__encoded=b"", image__class__label=[0], image__class__text=b"\xff")], "text that is not UTF-8"),
        ([], "without a record"),
    ],
)
def test_records_that_are_not_clear_are_refused(tmp_path: Path, records: list[bytes], message: str) -> None:
    write(tmp_path / "a", records)
    with pytest.raises(DataError, match=message):
        run("--tfrecord", tmp_path / "a", "--out", tmp_path / "pack")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda root: [f"trian={root}/train-*"], "the split is 'trian'; valid are train, val and test"),
        (lambda root: [f"train={root}/none-*"], "there is no such file"),
        (lambda root: [f"train={root}/train-*", f"{root}/val*"], "give the split of all files"),
        (lambda root: [f"{root}/train-*", f"{root}/train-00000*"], "1 file is given twice"),
    ],
)
def test_files_that_cannot_be_told_are_refused(
    imagenet: Path, words: Callable[[Path], list[str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run("--tfrecord", *words(imagenet), "--out", imagenet / "pack")


@pytest.mark.parametrize(
    ("text", "message"), [("cat\n\ndog\n", "line 2: is empty"), ("cat\ncat\n", "line 2: cat"), ("", "it is empty")]
)
def test_a_list_of_classes_that_is_not_clear_is_refused(imagenet: Path, text: str, message: str) -> None:
    (imagenet / "names.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        run("--tfrecord", *splits(imagenet), "--classes", imagenet / "names.txt", "--out", imagenet / "pack")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(1))
    with pytest.raises(DataError, match="damaged, or no uncompressed TFRecord file"):
        run("--tfrecord", tmp_path / "a", "--out", tmp_path / "pack")
