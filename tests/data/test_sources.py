"""Layouts are read as documented, and what is wrong with them is said in one message."""

import csv
import io
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config.data import DataConfig
from pipeline.data.sources.base import DataSource, LabeledImage
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.servers import unreachable
from pipeline.errors import DataError


def image(seed: int = 0, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """uint8 (H, W, 3), coarse and colorful."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(seed)).save(path)
    return path


def folder(path: Path) -> DataSource:
    return open_source(DataConfig(source="folder", path=path))


def csv_file(path: Path, text: str) -> DataSource:
    path.write_text(text)
    return open_source(DataConfig(source="csv", path=path))


def graph_reads_the_same(source: DataSource) -> bool:
    keys = [sample.key for sample in source.list_images()]
    read = tf.data.Dataset.from_tensor_slices(keys).map(source.read_tf, num_parallel_calls=2)
    assert read.element_spec == tf.TensorSpec((), tf.string)
    return list(read.as_numpy_iterator()) == [source.read(key) for key in keys]


def test_folder_of_classes_is_read_with_its_subfolders_and_without_other_files(tmp_path):
    for key in ("cat/a.jpg", "cat/deep/er/b.PNG", "dog/c.webp"):
        write(tmp_path / key)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._a.jpg"):
        (tmp_path / "cat" / name).write_text("x")
    write(tmp_path / ".cache/x/d.jpg")
    source = folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.list_images() == [("cat/a.jpg", 0, None), ("cat/deep/er/b.PNG", 0, None), ("dog/c.webp", 1, None)]
    assert graph_reads_the_same(source)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "valid", "Testing"),
        ("TRAIN", "Validation", "Test"),
        ("train", "dev", "test"),
    ],
)
def test_split_folders_give_the_splits(tmp_path, train, val, test):
    for key in (f"{train}/cat/a.jpg", f"{train}/dog/b.jpg", f"{val}/cat/c.jpg", f"{test}/dog/d.jpg"):
        write(tmp_path / key)
    assert sorted((s.key.rpartition("/")[2], s.label, s.split) for s in folder(tmp_path).list_images()) == [
        ("a.jpg", 0, "train"),
        ("b.jpg", 1, "train"),
        ("c.jpg", 0, "val"),
        ("d.jpg", 1, "test"),
    ]


def test_a_class_may_be_called_train(tmp_path):
    for key in ("train/a.jpg", "bus/b.jpg"):
        write(tmp_path / key)
    assert folder(tmp_path).class_names == ("bus", "train")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere/a.jpg")
    write(tmp_path / "root/dog/b.jpg")
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    assert [s.key for s in folder(tmp_path / "root").list_images()] == ["cat/a.jpg", "dog/b.jpg"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no image"),
        (["a.jpg", "cat/b.jpg"], "1 image lies in no class folder:\n  .*a.jpg"),
        (["train/a.jpg", "test/cat/b.jpg"], "lies in no class folder"),
        (["cat/a.jpg", "dog/x.txt"], "1 class folder holds no image:\n  dog"),
        (["train/cat/a.jpg", "test/cat/b.jpg", "extra/c.jpg"], "other folders:\n  extra"),
        (["train/cat/a.jpg", "val/cat/b.jpg", "valid/cat/c.jpg"], "one split under two names: val, valid"),
        (["train/cat/a.jpg", "train/dog/b.jpg", "samples/c.jpg"], "other folders:\n  samples"),
        (["flowers/rose/a.jpg", "flowers/tulip/b.jpg"], "folders look like the classes; give data.path=.*/flowers"),
    ],
)
def test_unclear_folders_are_refused(tmp_path, keys, message):
    for key in keys:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.path: .*nowhere is missing"):
        folder(tmp_path / "nowhere")


def test_csv_gives_labels_and_splits_and_ignores_other_columns(tmp_path):
    write(tmp_path / "in/a.jpg")
    absolute = write(tmp_path / "b c.jpg")
    source = csv_file(
        tmp_path / "in/list.csv", "\ufefflabel,who,path,split\nred,me,a.jpg,train\nblue,you,../b c.jpg,validation\n"
    )
    assert source.class_names == ("blue", "red")
    assert source.list_images() == [("a.jpg", 1, "train"), ("../b c.jpg", 0, "val")]
    assert graph_reads_the_same(source)
    assert csv_file(tmp_path / "in/list.csv", f"path,label\n{absolute},red\n").list_images() == [
        ("../b c.jpg", 0, None)
    ]


def test_csv_faults_are_listed_all_at_once_with_their_lines(tmp_path):
    write(tmp_path / "a.jpg")
    write(tmp_path / "b.jpg")
    with pytest.raises(DataError) as caught:
        csv_file(
            tmp_path / "list.csv", "path,label,split\na.jpg,x,train\nno.jpg,x,train\nb.jpg,,tset\na.jpg,y,train\n,x,\n"
        )
    for fault in (
        "6 things are wrong",
        "line 3: there is no file no.jpg",
        "line 4: the label is empty",
        "line 4: the split is 'tset'",
        "line 5: a.jpg is in line 2, too",
        "line 6: the path is empty",
        "line 6: the split is ''",
    ):
        assert fault in str(caught.value)
    assert str(caught.value).count("line ") == 7  # line 2 is named once more, as the other place of a.jpg


@pytest.mark.parametrize(
    ("text", "message"), [("name,label\na,b\n", "has no column .path."), ("path,label\n", "no rows"), ("", "nothing")]
)
def test_csv_without_the_columns_or_rows_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        csv_file(tmp_path / "list.csv", text)


def test_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes("path,label\nä.jpg,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        open_source(DataConfig(source="csv", path=tmp_path / "list.csv"))


def test_digits_are_all_of_scikit_learns(tmp_path):
    source = open_source(DataConfig(source="digits"))
    samples, digits = source.list_images(), load_digits()
    assert len(samples) == 1797
    assert source.class_names == tuple("0123456789")
    assert [sample.label for sample in samples] == digits.target.tolist()
    decoded = np.asarray(Image.open(io.BytesIO(source.read("7"))), float)
    assert np.abs(decoded - digits.images[7] * 255 / 16).max() <= 0.5
    assert decoded.max() == 255
    assert graph_reads_the_same(source)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tiny data set as tensorflow-datasets keeps it: `dots` as ArrayRecord, `old_dots` as TFRecord."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def dots(n: int):
        return tf.data.Dataset.from_tensor_slices(
            {"image": np.stack([image(i) for i in range(n)]), "label": np.arange(n) % 2}
        )

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["odd", "even"])}
    )
    data_dir = tmp_path_factory.mktemp("tfds")
    for name, file_format in (("dots", "array_record"), ("old_dots", "tfrecord")):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=features,
            split_datasets={"train": dots(6), "validation": dots(3), "extra": dots(2)},
            data_dir=data_dir,
            file_format=file_format,
            disable_shuffling=True,
        )
    return data_dir


def test_tensorflow_datasets_are_read_by_position(prepared):
    source = open_source(DataConfig(source="tfds", name="dots", path=prepared))
    assert source.class_names == ("odd", "even")
    samples = sorted(source.list_images())
    assert [s[0] for s in samples] == [f"train/{i}" for i in range(6)] + [f"validation/{i}" for i in range(3)]
    assert [s.label for s in samples] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert [s.split for s in samples] == ["train"] * 6 + ["val"] * 3
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(source.read("train/4")))), image(4))
    assert graph_reads_the_same(source)


def test_tfrecord_is_refused_with_the_remedy(prepared):
    with pytest.raises(
        DataError, match=r"(?s)old_dots/1.0.0 is prepared as tfrecord.*Delete that folder or set data.path"
    ):
        open_source(DataConfig(source="tfds", name="old_dots", path=prepared))


def test_unknown_tensorflow_dataset_gets_the_nearest_name(tmp_path):
    with pytest.raises(DataError, match="'tf_flower'; did you mean 'tf_flowers'"):
        open_source(DataConfig(source="tfds", name="tf_flower", path=tmp_path))


def test_a_data_set_that_cannot_be_fetched_is_answered_in_time_with_two_ways_on(tmp_path, monkeypatch):
    def resolve(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source="tfds", name="tf_flowers", path=tmp_path))
    assert time.monotonic() - start < 25
    for part in (
        "tf_flowers could not be fetched",
        "flower_photos.tgz",
        "data.source=folder data.name=null data.path=FOLDER",
        "data_dir='DIR'",
    ):
        assert part in str(caught.value)


def test_a_silent_server_takes_no_longer_than_the_limit():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/set.tgz"
        start = time.monotonic()
        assert list(unreachable({url}, seconds=1.0)) == [url]
        assert time.monotonic() - start < 5


def test_name_resolution_that_hangs_takes_no_longer_than_the_limit(monkeypatch):
    def hang(*_args: object, **_kwargs: object) -> None:
        time.sleep(3)
        raise socket.gaierror(-2, "Name or service not known")  # after the test: in a thread that is left alone

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert unreachable({"http://example.invalid/a", "http://example.invalid/b"}, seconds=0.5) == {
        "http://example.invalid/a": "no answer within 0.5 s"
    }
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize(
    "text",
    [
        "file;species;fold\na.jpg;red;train\nb.jpg;blue;test\n",
        "file\tspecies\tfold\r\na.jpg\tred\ttrain\r\nb.jpg\tblue\ttest\r\n",
        '\ufefffile,notes,species,fold\n"a.jpg","one, two",red,Training\nb.jpg,,blue,TEST\n',
    ],
)
def test_csv_of_any_delimiter_and_columns(tmp_path, text):
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "images" / name)
    (tmp_path / "list.csv").write_bytes(text.encode())
    columns = {"path": "file", "label": "species", "split": "fold"}
    config = DataConfig(source="csv", path=tmp_path / "list.csv", columns=columns, root=tmp_path / "images")
    source = open_source(config)
    assert source.class_names == ("blue", "red")
    assert source.list_images() == [LabeledImage("a.jpg", 1, "train"), LabeledImage("b.jpg", 0, "test")]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    delimiter=st.sampled_from(",;\t|"),
    newline=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    labels=st.lists(st.text("äb1,;|\t' \"-", min_size=1).map(str.strip).filter(bool), min_size=4, max_size=4),
    blank=st.booleans(),
)
def test_any_csv_file_that_a_spreadsheet_writes_is_read(
    csv_images, delimiter, newline, encoding, quoting, labels, blank
):
    """Relative and absolute paths, also through a link, and names with delimiters in them."""
    paths = ["a.jpg", "../images/b, ü;|.jpg", csv_images / "images/c.jpg", csv_images / "link/d.jpg"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=quoting)
    writer.writerows(
        [("note", "species", "file", "more"), *(("x y", *row, "") for row in zip(labels, paths, strict=True))]
    )
    if blank:
        text.write(f"{delimiter * 3}{newline}{newline}")
    (csv_images / "list.csv").write_bytes(text.getvalue().encode(encoding))
    columns = {"path": "file", "label": "species"}
    config = DataConfig(source="csv", path=csv_images / "list.csv", columns=columns, root=csv_images / "link")
    source = open_source(config)
    images = source.list_images()
    assert [source.class_names[image.label] for image in images] == labels
    assert [source.read(image.key) for image in images] == [
        (csv_images / "images" / Path(path).name).read_bytes() for path in paths
    ]


@pytest.fixture(scope="module")
def csv_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("csv")
    for seed, name in enumerate(("a.jpg", "b, ü;|.jpg", "c.jpg", "d.jpg")):
        write(root / "images" / name, seed)
    (root / "link").symlink_to(root / "images")
    return root


def test_large_numbers_are_different_classes(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jpg")
    source = csv_file(tmp_path / "n.csv", f"path,label\na.jpg,{2**53}\nb.jpg,{2**53 + 1}.0\n")
    assert source.class_names == (str(2**53), str(2**53 + 1))


def test_integers_are_classes_however_they_are_written(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.jpg")
    source = csv_file(tmp_path / "n.csv", "path,label\na.jpg,1\nb.jpg,10\nc.jpg,2.0\nd.jpg,1.0\n")
    assert source.class_names == ("1", "2", "10")
    assert [image.label for image in source.list_images()] == [0, 2, 1, 0]
    padded = csv_file(tmp_path / "p.csv", "path,label\na.jpg,01\nb.jpg,1\nc.jpg,1.5\n")
    assert padded.class_names == ("01", "1", "1.5")


def test_a_csv_behind_a_link_finds_its_files(tmp_path):
    write(tmp_path / "store/a.jpg")
    (tmp_path / "disk/deep/sets").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk/deep/sets")
    (tmp_path / "disk/deep/sets/list.csv").write_text(f"path,label\n{tmp_path / 'store/a.jpg'},red\n")
    source = open_source(DataConfig(source="csv", path=tmp_path / "data/list.csv"))
    [image] = source.list_images()
    assert source.read(image.key) == (tmp_path / "store/a.jpg").read_bytes()


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(DataError, match=r"no column 'path'.*data.columns.path.*did you mean 'paths'"):
        csv_file(tmp_path / "list.csv", "paths,label\na.jpg,red\n")


def test_other_contents_under_the_same_size_and_time_are_another_version(tmp_path):
    write(tmp_path / "cat/a.jpg")
    write(tmp_path / "dog/b.jpg")
    source = folder(tmp_path)
    path = tmp_path / "cat/a.jpg"
    os.utime(path, (0, 0))
    before = source.stat("cat/a.jpg")
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, (0, 0))
    assert source.stat("cat/a.jpg").size == before.size
    assert source.stat("cat/a.jpg") != before
